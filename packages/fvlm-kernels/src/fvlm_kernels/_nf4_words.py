"""NF4 codes to numbers inside a kernel that multiplies by them: what the products of decoding share.

On an NVIDIA GPU lane i of each warp holds value i mod 16 of the format, and a code is looked up with one shuffle, whose
index the hardware itself takes modulo 16: a shift and a shuffle a weight, where a table in memory takes a shift, a
mask, an address and a load. Elsewhere, under Triton's interpreter above all, the table is read; the numbers are equal.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# ruff: noqa: RET505, RUF005
# (for the kernels: Triton types its arguments and its growing tuples, and knows no starred ones)

from __future__ import annotations

import torch

from ._triton import HAS_TRITON, INTERPRETED, tl, triton

SHUFFLES = HAS_TRITON and not INTERPRETED and torch.version.hip is None
"""Whether codes are looked up by warp shuffles."""


def _lookups() -> str:
    """Return the PTX that looks up the eight codes of word $8 in the table over lanes $9.

    Bytes lie in order within a little-endian word, but in each byte the high half comes first. 0x101f splits a warp in
    two groups of 16 lanes, within which an index counts.
    """
    lines = [".reg .b32 code;"]
    for e in range(8):
        shift = (e ^ 1) * 4
        lines += [f"shr.u32 code, $8, {shift};", f"shfl.sync.idx.b32 ${e}, $9, code, 0x101f, 0xffffffff;"]
    return "{" + " ".join(lines) + "}"


if HAS_TRITON:
    LOOKUPS = tl.constexpr(_lookups())
    LOOKUPS_OPERANDS = tl.constexpr(",".join(["=&f"] * 8) + ",r,f")


@triton.jit
def values_by_lane(table_ptr, like, SHUFFLE: tl.constexpr):
    """Return, in the layout of the int32 tensor ``like``, the value that each thread holds for :func:`decode_word`."""
    if SHUFFLE:
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [like], dtype=tl.int32, is_pure=True, pack=1)
        return tl.load(table_ptr + (lane & 15))
    else:
        return like


@triton.jit
def load_words(packed_ptr, at, mask, ROWS: tl.constexpr, PER: tl.constexpr):
    """Load PER (1, 2 or 4) neighbouring words for each of ROWS places, counted in as many words, as PER tensors."""
    if PER == 1:
        return (tl.load(packed_ptr + at, mask=mask, other=0),)
    else:
        words = tl.load(packed_ptr + at[:, None] * PER + tl.arange(0, PER)[None, :], mask=mask[:, None], other=0)
        if PER == 2:
            return tl.split(words)
        else:
            even, odd = tl.split(tl.reshape(words, (ROWS, 2, 2)))
            w0, w2 = tl.split(even)
            w1, w3 = tl.split(odd)
            return w0, w1, w2, w3


@triton.jit
def decode_word(words, lane_values, table_ptr, SHUFFLE: tl.constexpr):
    """Return the eight fp32 values of each word, in the order of the weight's columns, as eight tensors."""
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            LOOKUPS,
            LOOKUPS_OPERANDS,
            [words, lane_values],
            dtype=(tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        values = ()
        for e in tl.static_range(8):
            values = values + (tl.load(table_ptr + ((words >> ((e ^ 1) * 4)) & 15)),)
        return values


@triton.jit
def eight_columns(x, ROWS: tl.constexpr):
    """Split ``(ROWS, 8)`` into its eight columns."""
    even, odd = tl.split(tl.reshape(x, (ROWS, 2, 2, 2)))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    c0, c4 = tl.split(even_low)
    c2, c6 = tl.split(even_high)
    c1, c5 = tl.split(odd_low)
    c3, c7 = tl.split(odd_high)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def load_scale(
    block,
    mask,
    absmax_ptr,
    nested_ptr,
    code_ptr,
    offset_ptr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):
    """Return the fp32 absmax of each block of the weight, decoded where it is nested."""
    if NESTED:
        q = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // NESTED_BLOCK, mask=mask, other=0.0)
        return tl.load(code_ptr + q) * nested + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0).to(tl.float32)
