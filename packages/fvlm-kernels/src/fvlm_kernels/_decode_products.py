"""The two launches of :mod:`.lora_decode`: narrow products with all A matrices, and the products with NF4 weights.

A program of the second decides by its number on which of up to three weights it works, and on which rows of it; for a
gated pair it works on the same rows of two. How a row of y is summed depends on the width of its weight alone.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# ruff: noqa: RUF005
# (for the kernels: Triton types its arguments and its growing tuples, and knows no starred ones)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._elementwise import activate
from ._launch import cdiv, launch, next_power_of_two
from ._library import register
from ._nf4_words import SHUFFLES, decode_word, eight_columns, load_scale, values_by_lane
from ._triton import tl, triton
from .nf4 import cached_table, words_of
from .nf4_format import NESTED_BLOCKSIZE

MAX_ROWS = 8
MAX_LAYERS = 3
THREADS = 64
"""How many threads the products have a program at most; each takes one word of a row at a time."""
PROGRAMS = 1024
"""How many programs the products should have at least, where rows of W can be dealt out for it."""


@triton.jit
def _narrow_kernel(
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    t_ptr,
    stride_x,
    K,
    M: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0)
    a_ptr = a0_ptr
    if row >= RANK:
        a_ptr = a1_ptr
    if row >= 2 * RANK:
        a_ptr = a2_ptr
    a_ptr += (row % RANK) * K
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros((BLOCK_K,), dtype=tl.float32),)
    for i in range(ITERATIONS):
        offs_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = offs_k < K
        a = tl.load(a_ptr + offs_k, mask=mask, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
        more = ()
        for m in tl.static_range(M):
            x = tl.load(x_ptr + m * stride_x + offs_k, mask=mask, other=0.0).to(tl.float32)
            more = more + (sums[m] + a * x,)
        sums = more
    for m in tl.static_range(M):
        tl.store(t_ptr + m * RANKS + row, tl.sum(sums[m]))


@triton.jit
def _products_kernel(
    x_ptr,
    y_ptr,
    t_ptr,
    table_ptr,
    packed0_ptr,
    packed1_ptr,
    packed2_ptr,
    absmax0_ptr,
    absmax1_ptr,
    absmax2_ptr,
    nested0_ptr,
    nested1_ptr,
    nested2_ptr,
    code0_ptr,
    code1_ptr,
    code2_ptr,
    offset0_ptr,
    offset1_ptr,
    offset2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    scaling0,
    scaling1,
    scaling2,
    stride_x,
    N0,
    N1,
    N2,
    M: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    # Which weight, and which of its rows; of a gated pair, the same rows of both, first those of the first.
    block = tl.program_id(0)
    blocks0 = tl.cdiv(N0, BLOCK_N)
    blocks1 = tl.cdiv(N1, BLOCK_N)
    packed_ptr, absmax_ptr, nested_ptr, code_ptr, offset_ptr = (
        packed0_ptr,
        absmax0_ptr,
        nested0_ptr,
        code0_ptr,
        offset0_ptr,
    )
    bias_ptr, b_ptr, scaling = bias0_ptr, b0_ptr, scaling0
    N = N0
    begin = 0
    slot = 0
    if block >= blocks0:
        packed_ptr, absmax_ptr, nested_ptr, code_ptr, offset_ptr = (
            packed1_ptr,
            absmax1_ptr,
            nested1_ptr,
            code1_ptr,
            offset1_ptr,
        )
        bias_ptr, b_ptr, scaling = bias1_ptr, b1_ptr, scaling1
        N = N1
        begin = N0
        slot = 1
    if block >= blocks0 + blocks1:
        packed_ptr, absmax_ptr, nested_ptr, code_ptr, offset_ptr = (
            packed2_ptr,
            absmax2_ptr,
            nested2_ptr,
            code2_ptr,
            offset2_ptr,
        )
        bias_ptr, b_ptr, scaling = bias2_ptr, b2_ptr, scaling2
        N = N2
        begin = N0 + N1
        slot = 2
    own = block
    if slot == 1:
        own = block - blocks0
    if slot == 2:
        own = block - blocks0 - blocks1
    first = own * BLOCK_N
    # A thread takes one word of each row and step: its codes, values and columns of x stay in its registers.
    e = tl.arange(0, 8)
    lane_values = values_by_lane(table_ptr, tl.arange(0, BLOCK_W), SHUFFLE)
    sums = ()
    for _ in tl.static_range(ROWS * M):
        sums = sums + (tl.zeros((BLOCK_W,), dtype=tl.float32),)
    for i in range(ITERATIONS):
        offs_w = i * BLOCK_W + tl.arange(0, BLOCK_W)
        mask_w = offs_w < WORDS
        xs = ()
        for m in tl.static_range(M):
            at_x = m * stride_x + offs_w[:, None] * 8 + e[None, :]
            x = tl.load(x_ptr + at_x, mask=mask_w[:, None], other=0.0).to(tl.float32)
            xs = xs + eight_columns(x, BLOCK_W)
        more = ()
        for r in tl.static_range(ROWS):
            n = first + r % BLOCK_N
            if r >= BLOCK_N:
                codes_ptr, scales_ptr, second_ptr, dequant_ptr, shift_ptr = (
                    packed1_ptr,
                    absmax1_ptr,
                    nested1_ptr,
                    code1_ptr,
                    offset1_ptr,
                )
            else:
                codes_ptr, scales_ptr, second_ptr, dequant_ptr, shift_ptr = (
                    packed_ptr,
                    absmax_ptr,
                    nested_ptr,
                    code_ptr,
                    offset_ptr,
                )
            mask = offs_w < tl.where(n < N, WORDS, 0)
            at = n.to(tl.int64) * WORDS + offs_w
            words = tl.load(codes_ptr + at, mask=mask, other=0)
            absmax = load_scale(
                at // (BLOCKSIZE // 8), mask, scales_ptr, second_ptr, dequant_ptr, shift_ptr, NESTED, NESTED_BLOCK
            )
            values = decode_word(words, lane_values, table_ptr, SHUFFLE)
            for m in tl.static_range(M):
                product = values[0] * xs[m * 8]
                for c in tl.static_range(1, 8):
                    product += values[c] * xs[m * 8 + c]
                more = more + (sums[r * M + m] + product * absmax,)
        sums = more
    offs_r = tl.arange(0, BLOCK_R)
    made = ()
    for r in tl.static_range(ROWS):
        n = first + r % BLOCK_N
        if r >= BLOCK_N:
            bias_ptr, b_ptr, scaling, slot = bias1_ptr, b1_ptr, scaling1, 1
        for m in tl.static_range(M):
            y = tl.sum(sums[r * M + m])
            if BIASED:
                y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            if RANK:
                mask_r = offs_r < tl.where(n < N, RANK, 0)
                b = tl.load(b_ptr + n * RANK + offs_r, mask=mask_r, other=0.0)
                t = tl.load(t_ptr + m * RANKS + slot * RANK + offs_r, mask=mask_r, other=0.0)
                y += scaling * tl.sum(b.to(tl.float32) * t)
            made = made + (y,)
    for r in tl.static_range(BLOCK_N):
        for m in tl.static_range(M):
            if GATED:
                y = activate(made[r * M + m], ACT) * made[(BLOCK_N + r) * M + m]
                at_y = y_ptr + m * N + first + r
            else:
                y = made[r * M + m]
                at_y = y_ptr + m * (N0 + N1 + N2) + begin + first + r
            tl.store(at_y, y.to(y_ptr.dtype.element_ty), mask=first + r < N)


def _aligned_words(packed: torch.Tensor) -> torch.Tensor:
    """Return packed codes as 4-byte words, copied where a graph was given some that begin elsewhere."""
    words, per = words_of(packed)
    return words if per == 8 else words_of(packed.clone())[0]


def _launch_narrow(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    rows, k = x.shape
    rank = matrices[0].shape[0]
    t = torch.empty((rows, rank * len(matrices)), dtype=torch.float32, device=x.device)
    block = min(2048, next_power_of_two(k))
    padded = [matrices[min(i, len(matrices) - 1)].contiguous() for i in range(MAX_LAYERS)]
    launch(
        _narrow_kernel,
        (rank * len(matrices),),
        x,
        *padded,
        t,
        x.stride(0),
        k,
        M=rows,
        RANK=rank,
        RANKS=rank * len(matrices),
        ITERATIONS=cdiv(k, block),
        BLOCK_K=block,
        num_warps=8 if block == 2048 else 4,
    )
    return t


def _block_n(rows_of_weights: int, sums: int) -> int:
    """Return how many rows of W a program takes: as many as leave enough programs, and registers for all sums.

    How a row of y is summed does not depend on it. A pair counts for twice its sums: it has two sets of addresses.
    """
    return next((n for n in (4, 2) if cdiv(rows_of_weights, n) >= PROGRAMS and n * sums <= MAX_ROWS), 1)


def _products(
    x: torch.Tensor,
    narrow: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    scalings: Sequence[float],
    sizes: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
    act: str,
) -> torch.Tensor:
    """Launch both kernels; ``tensors`` are, layer by layer, the five parts of the weight, bias, A and B.

    With an ``act`` there are two layers of one size, and what is stored is act(first) · second.
    """
    layers = [tensors[i : i + 8] for i in range(0, len(tensors), 8)]
    of = [list(column) for column in zip(*layers, strict=True)]
    adapters = [a for a in of[6] if a is not None]
    rank = adapters[0].shape[0] if adapters else 0
    t = _launch_narrow(narrow, adapters) if adapters else None
    rows, k = x.shape
    words = k // 8
    taken = sizes[:1] if act else sizes
    y = torch.empty((rows, sum(taken)), dtype=dtype, device=x.device)
    codes = [_aligned_words(p) for p in of[0] if p is not None]
    block_n, block_w = _block_n(sum(taken), 4 * rows if act else rows), min(THREADS, next_power_of_two(words))

    def three(column: Sequence[Any]) -> list[Any]:
        filled = [value if value is None else value.contiguous() for value in column]
        return [filled[min(i, len(filled) - 1)] for i in range(MAX_LAYERS)]

    padded = [*sizes, 0, 0][:MAX_LAYERS]
    launch(
        _products_kernel,
        (sum(cdiv(n, block_n) for n in taken),),
        x,
        y,
        t,
        cached_table(x.device),
        *three(codes),
        *(part for column in (*of[1:6], of[7]) for part in three(column)),
        *(scalings[min(i, len(scalings) - 1)] for i in range(MAX_LAYERS)),
        x.stride(0),
        *padded,
        M=rows,
        WORDS=words,
        BLOCKSIZE=blocksize,
        NESTED=of[2][0] is not None,
        NESTED_BLOCK=NESTED_BLOCKSIZE,
        BIASED=of[5][0] is not None,
        RANK=rank,
        RANKS=rank * len(sizes),
        BLOCK_R=next_power_of_two(rank),
        ITERATIONS=cdiv(words, block_w),
        ACT=act,
        GATED=act != "",
        ROWS=2 * block_n if act else block_n,
        BLOCK_N=block_n,
        BLOCK_W=block_w,
        SHUFFLE=SHUFFLES,
        num_warps=max(1, block_w // 32),
    )
    return y


products_op = register(
    "lora_decode(Tensor x, Tensor narrow, Tensor?[] tensors, float[] scalings, int[] sizes, int blocksize,"
    " ScalarType dtype, str act) -> Tensor",
    _products,
    lambda x, narrow, tensors, scalings, sizes, blocksize, dtype, act: x.new_empty(
        (x.shape[0], sizes[0] if act else sum(sizes)), dtype=dtype
    ),
)
