"""Rows that a norm holds in pieces of a power of two: how they are cut, dealt out to programs and loaded."""

# mypy: allow-untyped-defs, disable-error-code="assignment"
# ruff: noqa: RUF005
# (for the kernel's part: Triton types its arguments and its growing tuples, and knows no starred ones)

from __future__ import annotations

from typing import NamedTuple

import torch

from ._launch import cdiv, next_power_of_two, persistent_programs, row_blocks, stages_for
from ._triton import tl, triton


def row_chunks(n: int) -> tuple[int, int, int, int]:
    """Cut rows of ``n`` columns into pieces of a power of two, so that few columns of a tile lie behind the last.

    A row of 1280 columns in one tile of 2048 leaves 3 of 8 threads without work; in five pieces of 256 none. A piece
    is added to the one before it in registers, so that a row is added up over threads once, whatever its pieces.

    Args:
        n: columns of a row.

    Returns:
        ``(BLOCK_M, CHUNK, CHUNKS, num_warps)`` by the width alone: rows of a program, columns and number of pieces,
        and warps. Rows of up to 256 columns are one piece, and share a program.
    """
    if n <= 256:
        block_m, block_n, num_warps = row_blocks(n)
        return block_m, block_n, 1, num_warps
    chunk = max(256, next_power_of_two(cdiv(n, 8)))
    return 1, chunk, cdiv(n, chunk), min(16, next_power_of_two(cdiv(n, 1024)))


class Deal(NamedTuple):
    """How the rows of a backward pass are dealt out: each program takes ``steps`` blocks of ``block_m`` rows."""

    programs: int
    steps: int
    block_m: int
    chunk: int
    chunks: int
    num_warps: int
    stages: int
    """one more than the blocks of rows that are on their way to shared memory while one is computed"""


def deal_chunks(device: torch.device, m: int, n: int, summing: bool, itemsize: int) -> Deal:
    """Deal out ``m`` rows of ``n`` columns in pieces, as :func:`._norms.deal_rows` does whole ones.

    Without sums two rows of up to 2048 columns share a program, each with a warp of its own. Programs that carry sums
    along are few, since each leaves its share of the sums to be added up; up to 1280 columns they take four rows at a
    time, each with a warp of its own.

    Args:
        device: where it runs.
        m: rows.
        n: columns.
        summing: whether weight gradients are summed.
        itemsize: bytes that are read of a column, of all tensors together.
    """
    block_m, chunk, chunks, num_warps = row_chunks(n)
    if not summing:
        if chunks > 1 and n <= 2048:
            block_m, num_warps = 2, 2
        return Deal(cdiv(m, block_m), 1, block_m, chunk, chunks, num_warps, stages=1)
    per_processor = 2 if n > 2048 or 256 < n <= 1280 else 4
    if chunks == 1:
        block_m, chunk, num_warps = row_blocks(n, tile=2048)
    elif n <= 1280:
        block_m, num_warps = 4, 4
    else:
        num_warps = min(16, 2 * num_warps)
    blocks = cdiv(m, block_m)
    share = cdiv(blocks, persistent_programs(device, blocks, per_processor))
    stages = stages_for(device, block_m * chunk * chunks * itemsize, per_processor)
    return Deal(cdiv(blocks, max(share, 1)), share, block_m, chunk, chunks, num_warps, stages)


@triton.jit
def load_chunks(
    ptr,
    stride,
    offs_m,
    end,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Load rows ``offs_m``, those before ``end``, in pieces of CHUNK columns; zeros elsewhere.

    A stride of 0 gives each row the same numbers, such as a weight's, in the threads that hold the row's pieces; loaded
    in one dimension they would go through shared memory to get there.
    """
    offs_n = tl.arange(0, CHUNK)
    pieces = ()
    for c in tl.static_range(CHUNKS):
        mask = (offs_m < end)[:, None] & (c * CHUNK + offs_n < N)[None, :]
        at = offs_m[:, None] * stride + c * CHUNK + offs_n[None, :]
        pieces = pieces + (tl.load(ptr + at, mask=mask, other=0.0),)
    return pieces
