"""Attention within segments of one packed row: images, windows or documents of different lengths, without padding.

Maths, for every segment of tokens [cu[i], cu[i+1]) and head h, whose keys are those of head ⌊h · Hkv / H⌋::

    out = softmax(scale · Q Kᵀ  + mask) V,      mask = 0, or −∞ above the diagonal where causal

Gradients are those of scaled dot-product attention (Dao, FlashAttention-2, 2023).

Backends, since nothing here is a kernel of our own:

* ``"batched"``: for segments of one length, as ``max_seqlen`` tells without asking the device: one call of
  ``scaled_dot_product_attention`` on views, for which PyTorch may take cuDNN's kernels.
* ``"flash"``: ``torch.nn.attention.varlen.varlen_attn`` of torch 2.11 or later, on a GPU of compute capability 8.0 or
  higher, in fp16 and bf16: one launch over all segments, no host synchronization when ``max_seqlen`` is given. Forward
  is deterministic; backward adds up dQ with atomics, so that two runs may differ in the last bits.
* ``"torch"``: the reference, ``scaled_dot_product_attention`` segment by segment. It reads the lengths on the host.

Of the first and the last two runs give the same bits where that function's do: not always in 16 bit on a GPU, whose
fused forms use atomics in backward.

Numerics: scores and softmax in fp32; ``"flash"`` rounds the probabilities to the inputs' dtype for the second product.
In fp32 on a GPU the reference takes PyTorch's plain form of it, which keeps a segment's scores: the gradients of the
memory-efficient form were up to six times as far from float64 (H200).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ._launch import check_floating, check_same_device, check_same_dtype, check_shape

AttentionImpl = Literal["batched", "flash", "torch"]
HAS_VARLEN = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)
"""The least compute capability that PyTorch's flash attention takes."""
MAX_HEAD_DIM = 256


def _ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, causal: bool, scale: float | None
) -> torch.Tensor:
    """Attend segment by segment in plain PyTorch; float64 stays float64."""
    lengths = cu_seqlens.diff().tolist() or [0]  # without a segment one of no rows, for its gradients
    outs = []
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.MATH) if q.is_cuda and q.dtype == torch.float32 else nullcontext():
        for segment in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in segment)
            out = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
            outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # absent before torch 2.10, and of another signature in it

    window = (-1, 0) if causal else (-1, -1)
    cu = cu_seqlens.to(torch.int32)
    out = varlen_attn(q, k, v, cu, cu, max_seqlen, max_seqlen, scale=scale, window_size=window)
    if isinstance(out, tuple):  # only where auxiliary outputs are asked for
        out = out[0]
    return out


def _batched(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, causal: bool, scale: float | None
) -> torch.Tensor:
    """Attend within segments of one length in one call."""
    query, key, value = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether :func:`varlen_attention` has ``"flash"`` on a device in a dtype, for heads that are not too wide."""
    if not HAS_VARLEN or dtype not in FLASH_DTYPES or device.type != "cuda":
        return False
    # Dynamo cannot ask a device.
    return torch.compiler.is_compiling() or torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def runs_flash(q: torch.Tensor) -> bool:
    """Tell whether :func:`varlen_attention` has ``"flash"`` for queries ``(…, D)`` of this device, dtype and width."""
    return q.shape[-1] <= MAX_HEAD_DIM and has_flash(q.device, q.dtype)


def _choose(
    impl: AttentionImpl | None, q: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None
) -> AttentionImpl:
    """Return the backend asked for, or the best there is; raise where the one asked for cannot run."""
    possible = runs_flash(q)
    count = cu_seqlens.numel() - 1
    even = max_seqlen is not None and count * max_seqlen == q.shape[0] > 0
    if impl is None:
        if not possible:
            return "torch"
        return "batched" if even else "flash"
    if impl not in get_args(AttentionImpl):
        raise ValueError(f'varlen_attention: impl is {impl!r}; it must be None, "batched", "flash" or "torch"')
    if impl == "flash" and not possible:
        raise ValueError(
            f'varlen_attention: impl is "flash" with {q.dtype} of {q.shape[-1]} channels on {q.device} and torch'
            f" {torch.__version__}; it needs fp16 or bf16, at most {MAX_HEAD_DIM} channels, a GPU of compute"
            ' capability 8.0 and torch 2.11, use impl="torch"'
        )
    if impl == "batched" and not even:
        raise ValueError(
            f'varlen_attention: impl is "batched" with {count} segments, max_seqlen {max_seqlen} and'
            f' {q.shape[0]} tokens; it needs segments of one length, which max_seqlen says, use impl="torch"'
        )
    return impl


def _check_starts(starts: list[int], tokens: int, step: int | None) -> None:
    """Raise a ``ValueError`` unless segments fill the tokens, each of ``step`` tokens where that is given."""
    if starts[0] != 0 or starts[-1] != tokens or sorted(starts) != starts:
        raise ValueError(
            f"varlen_attention: cu_seqlens starts at {starts[0]} and ends at {starts[-1]}; it must rise from 0 to"
            f" {tokens}"
        )
    if step is not None and starts != list(range(0, tokens + 1, step)):
        raise ValueError(
            f'varlen_attention: impl is "batched" and max_seqlen {step}, but not every segment of cu_seqlens is that'
            ' long; use impl="torch"'
        )


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: AttentionImpl | None = None,
) -> torch.Tensor:
    """Attend within each segment of a packed row; see the module for maths, backends and numerics.

    Args:
        q: ``(T, H, D)``, floating.
        k: ``(T, Hkv, D)``, same dtype; H is a multiple of Hkv.
        v: like ``k``.
        cu_seqlens: ``(segments + 1,)`` integers: where each segment starts, and T. On a GPU it is not read on the host
            but by ``"torch"``, so that its contents are trusted there.
        max_seqlen: length of the longest segment; ``None`` reads it from the device, which synchronizes. Where it says
            that all segments are of one length, they are attended to as a batch.
        causal: whether a token sees only itself and what comes before it in its segment.
        scale: what the scores are multiplied by; ``None`` for 1 / √D.
        impl: ``"batched"``, ``"flash"``, ``"torch"``, or ``None``: where flash can run, a batch of segments of one
            length or flash, else ``"torch"``.

    Returns:
        ``(T, H, D)`` in ``q``'s dtype.

    Raises:
        ValueError: shapes or devices do not fit, the lengths do not add up (where they are read), or the backend asked
            for cannot run here.
        TypeError: dtypes are not floating or differ, or ``cu_seqlens`` is not of integers.

    Example:
        >>> out = varlen_attention(q, k, v, cu_seqlens, max_seqlen)
    """
    check_floating("varlen_attention", q=q, k=k, v=v)
    check_same_dtype("varlen_attention", q=q, k=k, v=v)
    check_same_device("varlen_attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    check_shape("varlen_attention", "v", v, k.shape)
    if q.dim() != 3 or k.dim() != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"varlen_attention: q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}; they must be (T, H, D) and"
            " (T, Hkv, D), H a multiple of Hkv"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"varlen_attention: cu_seqlens has dtype {cu_seqlens.dtype}; it must be int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"varlen_attention: cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (segments + 1,)"
        )
    chosen = _choose(impl, q, cu_seqlens, max_seqlen)
    if chosen == "flash":
        if q.numel() == 0:
            return q + 0 * (k.sum() + v.sum())  # keeps the graph where there is nothing to attend to
        longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
        return _flash(q, k, v, cu_seqlens, longest, causal, scale)
    if chosen == "torch":
        _check_starts(cu_seqlens.tolist(), q.shape[0], None)
        return _ref(q, k, v, cu_seqlens, causal, scale)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_starts(cu_seqlens.tolist(), q.shape[0], max_seqlen)
    return _batched(q, k, v, q.shape[0] // (cu_seqlens.numel() - 1), causal, scale)
