"""FlashAttention-4's kernels for Hopper, called on whole tensors. Imported by `fvlm_core.flash` alone, since the
package behind it is optional and takes seconds to import.

The forward pass is the package's own call. So is the backward pass, except for heads whose width the main kernel
rounds up to no multiple of 32: those of 72 and 80 channels, which most vision towers have. For these the package's
call returns wrong gradients of the queries (4.0.0b36): the main kernel writes their fp32 sums in rows of 80, and the
last kernel reads them in rows of 96 (Dao-AILab/flash-attention, pull request 2896). `_backward_of_one_width` runs the
same three kernels with the main kernel's width for the sums. The first one keeps the package's own rounding, and does
not clear the sums: told of rows of 80, its threads cover 128 tokens of a tile of 64 and write beyond the last tile.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cutlass import Float32, Int32, cute
from flash_attn.cute import interface
from flash_attn.cute.cache_utils import get_jit_cache
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.utils import AuxData
from torch import Tensor

_MULTIPLE = 16
"""What the main kernel rounds a head's width up to."""
_OF_THE_OTHERS = 32
"""What the package rounds it up to before that kernel, and after it."""
_ABSENT = (None,) * 7
"""Lengths in use, windows and semaphores, which the main kernel could take as well."""
_compiled = get_jit_cache("fvlm_bwd")


def _up(count: int, to: int) -> int:
    return (count + to - 1) // to * to


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, cu: Tensor | None = None, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: `(batch, tokens, heads, head_dim)`, or `(total, heads, head_dim)` with `cu`; bf16 or fp16.
        k: like `q`.
        v: like `q`.
        scale: what the scores are multiplied by.
        causal: whether a token sees only what comes before it.
        cu: `(segments + 1,)` int32, where each segment starts, and the total.
        longest: length of the longest segment, with `cu`.

    Returns:
        The result, in the shape of `q`, and the logarithms of the rows' sums, `(batch, heads, tokens)` or
        `(heads, total)`, fp32.
    """
    made = interface._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **_bounds(cu, longest)
    )
    out, lse, *_ = made
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    cu: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `forward` for `q`, `k` and `v`; the arguments are its own, and what it returned."""
    if _main_kernel(interface.torch2cute_dtype_map[q.dtype], q.shape[-1], causal).tile_hdim % _OF_THE_OTHERS:
        return _backward_of_one_width(q, k, v, out, dout, lse, scale, causal, cu)
    dq, dk, dv, *_ = interface._flash_attn_bwd(q, k, v, out, dout, lse, scale, causal, **_bounds(cu, longest))
    return dq, dk, dv


def _bounds(cu: Tensor | None, longest: int | None) -> dict[str, Any]:
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _backward_of_one_width(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, dout, lse = (interface.maybe_contiguous(t) for t in (q, k, v, out, dout, lse))
    heads, width = q.shape[-2:]
    dtype = interface.torch2cute_dtype_map[q.dtype]
    kernel, tiles = _main_kernel(dtype, width, causal), interface._tile_size_bwd_sm90(width, width, causal, False)
    rows = tiles.m_block_size
    if cu is None:
        shape: tuple[int, ...] = (q.shape[0], heads, _up(q.shape[1], rows))
    else:  # each segment starts at a multiple of a block
        shape = (heads, (q.shape[0] + cu.shape[0] * rows - 1) // rows * rows)
    dpsum, lse_log2 = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    sums = q.new_zeros((*shape[:-1], shape[-1] * kernel.tile_hdim), dtype=torch.float32)
    before = (out, dout, dpsum, lse, lse_log2, None, cu, None, None, dtype, width, width, rows)
    interface._bwd_preprocess(*before, hdim_multiple_of=_OF_THE_OTHERS, fake_mode=False)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    key = (dtype, width, causal, cu is not None)
    if key not in _compiled:
        _compiled[key] = _compile(kernel, dtype, cu is not None)
    tensors = q, k, v, dout, lse_log2, dpsum, sums, dk, dv
    _compiled[key](*tensors, scale, cu, cu, *_ABSENT, AuxData(None, None), None, None)
    threads = 128 if tiles.dQ_single_wg else tiles.num_wg * 128
    after = (sums, dq, scale, cu, None, 90, dtype, width, rows, threads, tiles.AtomLayoutMdQ, tiles.dQ_swapAB)
    interface._bwd_postprocess_convert(*after, hdim_multiple_of=_MULTIPLE, fake_mode=False)
    return dq, dk, dv


@cache
def _main_kernel(dtype: Any, width: int, causal: bool) -> Any:
    """Return the kernel for dK, dV and the sums of dQ, with the package's choice of tiles."""
    tiles = interface._tile_size_bwd_sm90(width, width, causal, False)
    return FlashAttentionBackwardSm90(
        dtype,
        width,
        is_causal=causal,
        tile_m=tiles.m_block_size,
        tile_n=tiles.n_block_size,
        Q_stage=tiles.num_stages_Q,
        dO_stage=tiles.num_stages_dO,
        PdS_stage=tiles.num_stages_PdS,
        SdP_swapAB=tiles.SdP_swapAB,
        dKV_swapAB=tiles.dKV_swapAB,
        dQ_swapAB=tiles.dQ_swapAB,
        AtomLayoutMSdP=tiles.AtomLayoutMSdP,
        AtomLayoutNdKV=tiles.AtomLayoutNdKV,
        AtomLayoutMdQ=tiles.AtomLayoutMdQ,
        num_threads=(tiles.num_wg + 1) * 128,
        dQ_single_wg=tiles.dQ_single_wg,
    )


def _compile(kernel: Any, dtype: Any, segments: bool) -> Any:
    """Compile it for any number of tokens, heads and segments."""
    q, k, v, _, dout, _, dk, dv, _, lse_log2, dpsum, sums, *_ = interface.make_fake_bwd_tensors(
        dtype, has_gqa=False, varlen_q=segments, varlen_k=segments
    )
    cu = interface.fake_tensor(Int32, (cute.sym_int(),), divisibility=1) if segments else None
    tensors = q, k, v, dout, lse_log2, dpsum, sums, dk, dv
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    rest = (Float32(1.0), cu, cu, *_ABSENT, AuxData(None, None), None, None, stream)
    return cute.compile(kernel, *tensors, *rest, options="--enable-tvm-ffi")
