"""What the norms share: their checks, how the rows of a backward pass are dealt out, and the sum over their shares."""

# mypy: allow-untyped-defs
# (for the kernel, whose arguments Triton types)

from __future__ import annotations

import torch

from ._launch import (
    cdiv,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    launch,
    next_power_of_two,
    persistent_programs,
    row_blocks,
    stages_for,
)
from ._triton import tl, triton

MAX_WIDTH = 16384
"""Widest row that the kernels hold in registers."""


@triton.jit
def _sum_into(shares_ptr, out_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    start = 0
    while start < P:  # not `for`: the interpreter's `range` rejects a run-time bound under NumPy 2.4
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (offs_n < N)[None, :]
        total += tl.load(shares_ptr + offs_p[:, None].to(tl.int64) * N + offs_n[None, :], mask=mask, other=0.0)
        start += BLOCK_P
    tl.store(out_ptr + offs_n, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _sum_shares_kernel(
    first_ptr, second_ptr, first_out_ptr, second_out_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    if tl.program_id(1) == 0:
        _sum_into(first_ptr, first_out_ptr, P, N, BLOCK_P, BLOCK_N)
    else:
        _sum_into(second_ptr, second_out_ptr, P, N, BLOCK_P, BLOCK_N)


def sum_shares(*shares: tuple[torch.Tensor, torch.dtype]) -> list[torch.Tensor]:
    """Add up the programs' fp32 shares ``(P, N)`` of one or two weight gradients, in one launch and a fixed order.

    The launch has little to read and much to wait for, so that a program has most of its few columns' shares on their
    way at a time.

    Args:
        shares: of each gradient, and the dtype that it is wanted in; both of one shape.

    Returns:
        for each ``(N,)`` in its dtype, rounded once; zeros where there is no share.
    """
    (first, *_), (last, *_) = shares[0], shares[-1]
    (p, n), outs = first.shape, [part.new_empty(part.shape[1], dtype=dtype) for part, dtype in shares]
    block_n = 16
    launch(
        _sum_shares_kernel, (cdiv(n, block_n), len(shares)), first, last, outs[0], outs[-1], p, n,
        BLOCK_P=min(512, next_power_of_two(p)), BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    return outs


def check_norm(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Check the tensors of a norm over the last dimension of ``x``.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype is not floating, or ``residual``'s differs from ``x``'s.
    """
    check_floating(op, x=x, weight=weight, bias=bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it must have a last dimension to normalize over")
    check_shape(op, "weight", weight, x.shape[-1:])
    check_shape(op, "bias", bias, x.shape[-1:])
    check_shape(op, "residual", residual, x.shape)
    check_same_dtype(op, x=x, residual=residual)
    check_same_device(op, x=x, weight=weight, bias=bias, residual=residual)


def check_width(op: str, n: int) -> None:
    """Raise a ``ValueError`` where a row of ``n`` columns does not fit the kernels' registers."""
    if n > MAX_WIDTH:
        raise ValueError(f'{op}: rows of {n} columns; the kernel takes {MAX_WIDTH}, use impl="torch"')


def deal_rows(
    device: torch.device, m: int, n: int, summing: bool, itemsize: int
) -> tuple[int, int, int, int, int, int]:
    """Deal out ``m`` rows of ``n`` columns to the programs of a norm's backward pass.

    Args:
        device: where it runs.
        m: rows.
        n: columns.
        summing: whether weight gradients are summed: then few programs take many blocks of rows each, with fewer
            elements to a thread, since they carry the sums along; else each takes one.
        itemsize: bytes that are read of a column, of all tensors together.

    Returns:
        ``(programs, blocks of each, BLOCK_M, BLOCK_N, num_warps, num_stages of the loop over blocks)``.
    """
    block_m, block_n, num_warps = row_blocks(n, per_thread=16 if summing else 32)
    blocks, per_processor = cdiv(m, block_m), 2
    if not summing:
        return blocks, 1, block_m, block_n, num_warps, 1
    share = cdiv(blocks, persistent_programs(device, blocks, per_processor))
    stages = stages_for(device, block_m * block_n * itemsize, per_processor)
    return cdiv(blocks, max(share, 1)), share, block_m, block_n, num_warps, stages
