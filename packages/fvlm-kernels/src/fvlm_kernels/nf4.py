"""NF4 weights back to floating point, the nested absmaxes decoded on the way; bit for bit what bitsandbytes gives.

Maths (the format is described in :mod:`.nf4_format`), element i of the flat weight in block b = i // blocksize::

    absmax[b] = code[q[b]] · nested_absmax[b // 256] + offset      (nested; otherwise absmax[b] is read)
    w[i]      = NF4_VALUES[nibble(i)] · absmax[b]

A quantized weight is frozen: there is no gradient.

Numerics. Each of the three operations is rounded to fp32 by itself, as bitsandbytes' two separate kernels round, so the
product and the offset must not be contracted to one fused multiply-add: the kernel is compiled without contraction.
The last product is rounded once more to the dtype asked for. Two runs give the same bits, on every device.

One kernel reads 4 bytes (eight codes) a thread and writes their eight values as one run; the sixteen values lie in one
cache line, from which a warp reads at once.
"""

# mypy: allow-untyped-defs
# (for the kernels, whose arguments Triton types)

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch

from ._launch import Impl, cdiv, check_same_device, check_shape, launch, use_triton
from ._library import register
from ._triton import tl, triton
from .nf4_format import NESTED_BLOCKSIZE, NF4Weight, Parts, as_bytes, nf4_table

ELEMENTS_PER_PROGRAM = 4096


def _decode_absmax(
    absmax: torch.Tensor, nested_absmax: torch.Tensor | None, code: torch.Tensor | None, offset: torch.Tensor | None
) -> torch.Tensor:
    if nested_absmax is None or code is None or offset is None:
        return absmax
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()]
    return code.index_select(0, absmax.int()) * scale + offset


def _ref(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The module's maths in plain PyTorch."""
    numel = prod(shape)
    table = nf4_table(packed.device)
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)  # both values of every byte
    values = pairs.index_select(0, as_bytes(packed)[: (numel + 1) // 2].int()).view(-1)
    scale = _decode_absmax(absmax, nested_absmax, code, offset)
    if numel % blocksize == 0:
        scaled = values.view(-1, blocksize) * scale.unsqueeze(1)
    else:
        scaled = values[:numel] * scale.repeat_interleave(blocksize)[:numel]
    return scaled.view(shape).to(dtype)


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    code_ptr,
    offset_ptr,
    table_ptr,
    out_ptr,
    numel,
    PER: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # A word of PER codes never straddles two blocks, and a program begins at the start of one.
    base = tl.program_id(0).to(tl.int64) * BLOCK_W
    offs_w = tl.arange(0, BLOCK_W)
    left = numel - base * PER
    mask_w = offs_w * PER < left
    words = tl.load(packed_ptr + base + offs_w, mask=mask_w, other=0).to(tl.int32)
    block = base * PER // BLOCKSIZE + offs_w * PER // BLOCKSIZE
    if NESTED:
        q = tl.load(absmax_ptr + block, mask=mask_w, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // NESTED_BLOCK, mask=mask_w, other=0.0)
        absmax = tl.load(code_ptr + q) * nested + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask_w, other=0.0).to(tl.float32)
    e = tl.arange(0, PER)
    # Bytes lie in order within a little-endian word, but in each byte the high half comes first.
    codes = (words[:, None] >> ((e ^ 1) * 4)[None, :]) & 15
    values = tl.load(table_ptr + codes) * absmax[:, None]
    offs = offs_w[:, None] * PER + e[None, :]
    tl.store(out_ptr + base * PER + offs, values.to(out_ptr.dtype.element_ty), mask=offs < left)


@lru_cache
def cached_table(device: torch.device) -> torch.Tensor:
    """Return :data:`.nf4_format.NF4_VALUES` on ``device``, always the same tensor; for launchers, not for tracing."""
    return nf4_table(device)


def words_of(packed: torch.Tensor) -> tuple[torch.Tensor, int]:
    """View packed codes as 4-byte words where their length and address allow it, else as bytes.

    Returns:
        the flat view (int32 or uint8), and how many codes an element of it holds (8 or 2).
    """
    flat = as_bytes(packed)
    if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 and flat.data_ptr() % 4 == 0:
        return flat.view(torch.int32), 8
    return flat, 2


def _dequantize_into(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    out: torch.Tensor,
) -> None:
    words, per = words_of(packed)
    block_w = ELEMENTS_PER_PROGRAM // per
    launch(
        _nf4_dequantize_kernel,
        (cdiv(out.numel(), ELEMENTS_PER_PROGRAM),),
        words,
        absmax.contiguous(),
        None if nested_absmax is None else nested_absmax.contiguous(),
        None if code is None else code.contiguous(),
        offset,
        cached_table(out.device),
        out,
        out.numel(),
        PER=per,
        BLOCKSIZE=blocksize,
        NESTED=nested_absmax is not None,
        NESTED_BLOCK=NESTED_BLOCKSIZE,
        BLOCK_W=block_w,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    _dequantize_into(packed, absmax, nested_absmax, code, offset, blocksize, out)
    return out


_PARTS = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? code, Tensor? offset, int blocksize"
_op = register(
    f"nf4_dequantize({_PARTS}, SymInt[] shape, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda packed, absmax, nested_absmax, code, offset, blocksize, shape, dtype: packed.new_empty(shape, dtype=dtype),
)
_op_into = register(
    f"nf4_dequantize_into({_PARTS}, Tensor(a!) out) -> ()",
    _dequantize_into,
    lambda packed, absmax, nested_absmax, code, offset, blocksize, out: None,
)


def dequantize_parts(
    parts: Parts, blocksize: int, shape: Sequence[int], dtype: torch.dtype, *, triton: bool
) -> torch.Tensor:
    """Dequantize :attr:`.NF4Weight.parts` that were checked when they were put together; nothing is checked here."""
    made: torch.Tensor = (_op if triton else _ref)(*parts, blocksize, shape, dtype)
    return made


def _check_out(out: torch.Tensor, weight: NF4Weight, dtype: torch.dtype) -> None:
    check_shape("dequantize_nf4", "out", out, weight.shape)
    check_same_device("dequantize_nf4", out=out, packed=weight.packed)
    if out.dtype != dtype:
        raise TypeError(f"dequantize_nf4: out has dtype {out.dtype}; {dtype} was asked for")
    if not out.is_contiguous():
        raise ValueError(f"dequantize_nf4: out has strides {out.stride()}; it must be contiguous")


def dequantize_weight(
    weight: NF4Weight, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None, impl: Impl | None = None
) -> torch.Tensor:
    """Return an :class:`.NF4Weight` in floating point: :func:`dequantize_nf4` for parts that are already together."""
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dequantize_nf4: dtype is {dtype}; it must be a floating dtype")
    if out is not None:
        _check_out(out, weight, dtype)
    if not use_triton(impl, weight.packed.new_empty(0, dtype=dtype) if out is None else out):
        result = dequantize_parts(weight.parts, weight.blocksize, weight.shape, dtype, triton=False)
        return result if out is None else out.copy_(result)
    if out is not None:
        _op_into(*weight.parts, weight.blocksize, out)
        return out
    return dequantize_parts(weight.parts, weight.blocksize, weight.shape, dtype, triton=True)


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    nested_absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    blocksize: int = 64,
    out: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Turn NF4 codes back into numbers, bit for bit as bitsandbytes does; see the module for maths and numerics.

    Args:
        packed: two codes a byte, the first in the high half; any shape and any dtype, read as bytes.
        absmax: ``(blocks,)``: one a block, fp32; uint8 where ``nested_absmax`` is given.
        shape: of the weight; ``blocks`` is its number of elements over ``blocksize``, rounded up.
        dtype: of the result: fp32, fp16, bf16 (float64 with PyTorch, which then holds fp32 numbers).
        nested_absmax: ``(blocks / 256 rounded up,)`` fp32: scales of nested absmaxes (``quant_state.state2.absmax``).
        code: ``(256,)`` fp32, what the nested absmaxes' codes stand for (``quant_state.state2.code``).
        offset: one fp32 number, added to nested absmaxes (``quant_state.offset``); it is not read on the host.
        blocksize: elements that share an absmax.
        out: a contiguous tensor of ``shape`` and ``dtype`` to write into.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``out``, or a new tensor of ``shape`` and ``dtype``. It has no gradient.

    Raises:
        ValueError: sizes or devices do not fit, or nested parts are given in part.
        TypeError: a dtype is not the format's, or ``out``'s is not ``dtype``.

    Example:
        >>> q = quantize_nf4(linear.weight)
        >>> w = dequantize_nf4(q.packed, q.absmax, q.shape, q.dtype, nested_absmax=q.nested_absmax, code=q.code,
        ...                    offset=q.offset)
    """
    weight = NF4Weight(packed, absmax, tuple(shape), dtype, blocksize, nested_absmax, code, offset)
    return dequantize_weight(weight, out=out, impl=impl)
