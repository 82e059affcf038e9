"""Floating-point weights to NF4, with the rounding of bitsandbytes.

Maths (the format is described in :mod:`.nf4_format`), for each block of ``blocksize`` consecutive elements::

    absmax = max|w|
    z      = w · (1 / max(absmax, 1e-38))
    code   = how many of the 15 midpoints between neighbouring values lie below z   (a tie goes to the lower value)

and, nested, with the absmaxes in place of the weights: offset = mean(absmax), blocks of 256, the 256 values of the
dynamic tree in place of the sixteen.

Numerics. Everything is fp32, whatever the weight's dtype: the reciprocal is rounded, then the product. That is the
arithmetic of bitsandbytes' PyTorch implementation, and codes and absmaxes are bit-equal to what it gives. Its compiled
8-bit quantizer for CPUs does not always take the nearest of the 256 values; this one does. A block that holds a NaN
gets NaN for its absmax, so that it comes back as NaN. Two runs give the same bits.
"""

# mypy: allow-untyped-defs
# (for the kernels, whose arguments Triton types)

from __future__ import annotations

import torch

from ._launch import Impl, cdiv, check_floating, launch, use_triton
from ._library import register
from ._triton import tl, triton
from .nf4_format import NESTED_BLOCKSIZE, NF4Weight, check_blocksize, dynamic_code, nf4_table

SMALLEST = 1e-38
"""What stands in for the absmax of a block of zeros, so that its reciprocal is finite."""


def _nearest(flat: torch.Tensor, values: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(codes, absmax)``: for each element the index (int32) of the nearest of the sorted ``values``."""
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1)
    midpoints = (values[:-1] + values[1:]) / 2
    return torch.bucketize(scaled.view(-1)[: flat.numel()], midpoints, out_int32=True), absmax


def _ref(x: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(packed, absmax)`` of the module's maths in plain PyTorch."""
    codes, absmax = _nearest(x.reshape(-1).float(), nf4_table(x.device), blocksize)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)  # the code of zero
    pairs = codes.to(torch.uint8).view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1]).unsqueeze(1), absmax


@triton.jit
def _nf4_quantize_kernel(
    x_ptr,
    midpoints_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    SMALLEST: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs = offs_m[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    left = numel - first * BLOCKSIZE
    x = tl.load(x_ptr + first * BLOCKSIZE + offs, mask=offs < left, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), axis=1)
    holds_nan = tl.max((x != x).to(tl.int32), axis=1) > 0
    absmax = tl.where(holds_nan, float("nan"), absmax)
    tl.store(absmax_ptr + first + offs_m, absmax, mask=offs_m * BLOCKSIZE < left)
    ones, floor = tl.full((BLOCK_M,), 1.0, tl.float32), tl.full((BLOCK_M,), SMALLEST, tl.float32)
    scaled = x * tl.div_rn(ones, tl.maximum(absmax, floor))[:, None]
    codes = tl.zeros((BLOCK_M, BLOCKSIZE), dtype=tl.int32)
    for i in tl.static_range(15):
        codes += (scaled > tl.load(midpoints_ptr + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(codes, (BLOCK_M, BLOCKSIZE // 2, 2)))
    bytes_ = offs_m[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    at = packed_ptr + first * (BLOCKSIZE // 2) + bytes_
    tl.store(at, ((high << 4) | low).to(tl.uint8), mask=bytes_ * 2 < left)


def _quantize(x: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    flat, n = x.contiguous().view(-1), x.numel()
    packed = x.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    absmax = x.new_empty(cdiv(n, blocksize), dtype=torch.float32)
    table = nf4_table(x.device)
    block_m = max(1, 4096 // blocksize)
    launch(
        _nf4_quantize_kernel,
        (cdiv(n, block_m * blocksize),),
        flat,
        (table[:-1] + table[1:]) / 2,
        packed,
        absmax,
        n,
        SMALLEST=SMALLEST,
        BLOCKSIZE=blocksize,
        BLOCK_M=block_m,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return packed, absmax


_op = register(
    "nf4_quantize(Tensor x, int blocksize) -> (Tensor packed, Tensor absmax)",
    _quantize,
    lambda x, blocksize: (
        x.new_empty(((x.numel() + 1) // 2, 1), dtype=torch.uint8),
        x.new_empty(cdiv(x.numel(), blocksize), dtype=torch.float32),
    ),
)


@torch.no_grad()
def quantize_nf4(x: torch.Tensor, blocksize: int = 64, *, nested: bool = True, impl: Impl | None = None) -> NF4Weight:
    """Quantize a weight to NF4; see the module for maths and rounding.

    Args:
        x: any shape, not empty; fp32, fp16 or bf16.
        blocksize: elements that share an absmax: 32, 64, …, 4096.
        nested: whether to quantize the absmaxes to 8 bit as well (bitsandbytes' ``compress_statistics``).
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        the parts of the quantized weight: ``packed`` is ``(⌈elements / 2⌉, 1)`` uint8. They are constants: no gradient
        passes through.

    Raises:
        ValueError: ``x`` is empty or the block size unknown.
        TypeError: ``x`` is not floating.

    Example:
        >>> weight = quantize_nf4(linear.weight)
        >>> weight.packed.numel() * 2 == linear.weight.numel()
        True
    """
    check_floating("quantize_nf4", x=x)
    check_blocksize("quantize_nf4", blocksize)
    if not x.numel():
        raise ValueError(f"quantize_nf4: x has shape {tuple(x.shape)}; it must hold at least one element")
    packed, absmax = _op(x, blocksize) if use_triton(impl, x) else _ref(x, blocksize)
    if not nested:
        return NF4Weight(packed, absmax, tuple(x.shape), x.dtype, blocksize)
    offset, code = absmax.mean(), dynamic_code(x.device)
    q, nested_absmax = _nearest(absmax - offset, code, NESTED_BLOCKSIZE)
    return NF4Weight(packed, q.to(torch.uint8), tuple(x.shape), x.dtype, blocksize, nested_absmax, code, offset)
