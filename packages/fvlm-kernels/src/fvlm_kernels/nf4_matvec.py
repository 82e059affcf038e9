"""A few rows times an NF4 weight, straight from the codes: the products of decoding, which are bound by reading W.

Maths (the format is described in :mod:`.nf4_format`), for one to eight rows of x::

    y[m, n] = Σ_k x[m, k] · w[n, k],      w[n, k] = NF4_VALUES[nibble] · absmax[(n K + k) // blocksize]

There is no gradient: this is for decoding, and an x that asks for one is refused.

Numerics. Nested absmaxes are decoded as in :mod:`.nf4`. The sixteen codes of two neighbouring 4-byte words share an
absmax: their products with x are summed in fp32, multiplied by the absmax, and summed over words in fp32, so w is never
rounded to x's dtype, and y is rounded once. A row of y is summed in an order that depends on the weight's shape alone,
partial sums of split rows being added in a fixed order: two runs give the same bits, and a row's result does not depend
on the others.

Half a byte is read for each element of W, so eight rows cost about as much memory traffic as one. A width that is no
multiple of 8, or codes that do not begin at a 4-byte boundary, go through :mod:`.nf4` and a matrix product.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005
# (for the kernel: Triton types its arguments and its growing tuples, and knows no starred ones)

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._launch import (
    Impl,
    cdiv,
    check_floating,
    check_same_device,
    launch,
    next_power_of_two,
    rows_of,
    use_triton,
    without_autocast,
)
from ._library import register
from ._nf4_words import SHUFFLES, decode_word, eight_columns, load_scale, load_words, values_by_lane
from ._triton import tl, triton
from .nf4 import cached_table, dequantize_parts, words_of
from .nf4_format import NESTED_BLOCKSIZE, NF4Weight, Parts

MAX_ROWS = 8
MANY_ROWS = 8192
"""From how many rows on a program is one warp, whose sums need no shared memory; of fewer rows each gets four warps."""
WORDS_A_THREAD = (2, 1)
"""How many neighbouring words of a row a thread takes at a time, the first that divides the row."""
PROGRAMS = 1024
"""How many programs a launch should have at least; rows are split for it, whose parts take another launch to add up."""


def _ref(x: torch.Tensor, parts: Parts, blocksize: int, shape: Sequence[int], *, triton: bool = False) -> torch.Tensor:
    """The product with the dequantized weight, in x's dtype under autocast too, as the kernel has it."""
    with without_autocast(x):
        return torch.nn.functional.linear(x, dequantize_parts(parts, blocksize, shape, x.dtype, triton=triton))


@triton.jit
def _nf4_matvec_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    code_ptr,
    offset_ptr,
    table_ptr,
    y_ptr,
    stride_x,
    N,
    M: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PER: tl.constexpr,
    LARGE: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    # A thread takes PER neighbouring words of each row: their codes, values and columns of x stay in its registers.
    first = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    threads = tl.arange(0, BLOCK_T)
    e = tl.arange(0, 8)
    lane_values = values_by_lane(table_ptr, threads, SHUFFLE)
    sums = ()
    for _ in tl.static_range(BLOCK_N * M):
        sums = sums + (tl.zeros((BLOCK_T,), dtype=tl.float32),)
    for i in range(ITERATIONS):
        offs_t = (split * ITERATIONS + i) * BLOCK_T + threads
        mask = offs_t < WORDS // PER
        words = ()
        scales = ()
        products = ()
        for r in tl.static_range(BLOCK_N):
            row = tl.minimum(first + r, N - 1)  # rows behind the last are computed again, and not stored
            at = (row.to(tl.int64) if LARGE else row) * (WORDS // PER) + offs_t
            words = words + load_words(packed_ptr, at, mask, BLOCK_T, PER)
            block = at // (BLOCKSIZE // (8 * PER))
            scale = load_scale(block, mask, absmax_ptr, nested_ptr, code_ptr, offset_ptr, NESTED, NESTED_BLOCK)
            scales = scales + (scale,)
            for _ in tl.static_range(M):
                products = products + (tl.zeros((BLOCK_T,), dtype=tl.float32),)
        for j in tl.static_range(PER):
            xs = ()
            for m in tl.static_range(M):
                at_x = m * stride_x + (offs_t[:, None] * PER + j) * 8 + e[None, :]
                x = tl.load(x_ptr + at_x, mask=mask[:, None], other=0.0).to(tl.float32)
                xs = xs + eight_columns(x, BLOCK_T)
            more = ()
            for r in tl.static_range(BLOCK_N):
                values = decode_word(words[r * PER + j], lane_values, table_ptr, SHUFFLE)
                for m in tl.static_range(M):
                    product = products[r * M + m]
                    for c in tl.static_range(8):
                        product += values[c] * xs[m * 8 + c]
                    more = more + (product,)
            products = more
        more = ()
        for r in tl.static_range(BLOCK_N):
            for m in tl.static_range(M):
                more = more + (sums[r * M + m] + products[r * M + m] * scales[r],)
        sums = more
    for r in tl.static_range(BLOCK_N):
        for m in tl.static_range(M):
            at_y = y_ptr + (split * M + m).to(tl.int64) * N + first + r
            tl.store(at_y, tl.sum(sums[r * M + m]).to(y_ptr.dtype.element_ty), mask=first + r < N)


def _shape_of_launch(n: int, words: int) -> tuple[int, int, int, int]:
    """Return ``(BLOCK_T, PER, splits, iterations)`` from the weight's shape alone: they order the sums of a row."""
    per = next(p for p in WORDS_A_THREAD if words % p == 0)
    block_t = min(32 if n >= MANY_ROWS else 128, next_power_of_two(words // per))
    steps = cdiv(words // per, block_t)
    splits = max(1, min(steps, PROGRAMS // n))
    iterations = cdiv(steps, splits)
    return block_t, per, cdiv(steps, iterations), iterations


def _block_n(n: int, rows: int, block_t: int, splits: int) -> int:
    """Return how many rows of W a program takes: as many as leave enough programs, and registers for all sums."""
    most = 4 if block_t <= 32 else 2
    return next((b for b in (4, 2) if b <= most and cdiv(n, b) * splits >= PROGRAMS and b * rows <= 2 * MAX_ROWS), 1)


def _matvec(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    n: int,
) -> torch.Tensor:
    words, per = words_of(packed)
    k = x.shape[-1]
    if k % 8 or per != 8:
        return _ref(x, (packed, absmax, nested_absmax, code, offset), blocksize, (n, k), triton=True)
    rows = rows_of(x)
    m = rows.shape[0]
    block_t, per, splits, iterations = _shape_of_launch(n, k // 8)
    block_n = _block_n(n, m, block_t, splits)
    y = x.new_empty((splits, m, n), dtype=x.dtype if splits == 1 else torch.float32)
    launch(
        _nf4_matvec_kernel,
        (cdiv(n, block_n), splits),
        rows,
        words,
        absmax.contiguous(),
        None if nested_absmax is None else nested_absmax.contiguous(),
        None if code is None else code.contiguous(),
        offset,
        cached_table(x.device),
        y,
        rows.stride(0),
        n,
        M=m,
        WORDS=k // 8,
        BLOCKSIZE=blocksize,
        NESTED=nested_absmax is not None,
        NESTED_BLOCK=NESTED_BLOCKSIZE,
        ITERATIONS=iterations,
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        PER=per,
        LARGE=n * k >= 2**31,
        SHUFFLE=SHUFFLES,
        num_warps=max(1, block_t // 32),
    )
    whole = y[0] if splits == 1 else y.sum(0).to(x.dtype)
    return whole.view(*x.shape[:-1], n)


_op = register(
    "nf4_matvec(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? code, Tensor? offset,"
    " int blocksize, int n) -> Tensor",
    _matvec,
    lambda x, packed, absmax, nested_absmax, code, offset, blocksize, n: x.new_empty((*x.shape[:-1], n)),
)


def matvec_weight(x: torch.Tensor, weight: NF4Weight, *, impl: Impl | None = None) -> torch.Tensor:
    """Return ``x Wᵀ`` for an :class:`.NF4Weight`: :func:`nf4_matvec` for parts that are already together."""
    check_floating("nf4_matvec", x=x)
    if len(weight.shape) != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"nf4_matvec: x has shape {tuple(x.shape)} and the weight {weight.shape}; they must be (..., K) and (N, K)"
        )
    check_same_device("nf4_matvec", x=x, packed=weight.packed)
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    if rows > MAX_ROWS:
        raise ValueError(f"nf4_matvec: x has {rows} rows; it takes up to {MAX_ROWS}, use dequantize_nf4 and a product")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "nf4_matvec: x requires a gradient, which decoding has none of; use torch.no_grad() or lora_linear"
        )
    if not use_triton(impl, x) or not rows:
        return _ref(x, weight.parts, weight.blocksize, weight.shape)
    y: torch.Tensor = _op(x, *weight.parts, weight.blocksize, n)
    return y


def nf4_matvec(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    *,
    nested_absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    blocksize: int = 64,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Multiply one to eight rows by a transposed NF4 weight; see the module for maths and numerics.

    Args:
        x: ``(..., K)``, floating; any strides; the dimensions before the last hold 8 rows at most.
        packed, absmax, nested_absmax, code, offset, blocksize: the weight, as in :func:`.dequantize_nf4`.
        shape: ``(N, K)``.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``(..., N)`` in ``x``'s dtype.

    Raises:
        ValueError: shapes or devices do not fit, there are more than 8 rows, or ``x`` asks for a gradient.
        TypeError: a dtype does not fit.

    Example:
        >>> q = quantize_nf4(linear.weight)
        >>> with torch.no_grad():
        ...     y = nf4_matvec(token, q.packed, q.absmax, q.shape, nested_absmax=q.nested_absmax, code=q.code,
        ...                    offset=q.offset)
    """
    weight = NF4Weight(packed, absmax, tuple(shape), torch.float32, blocksize, nested_absmax, code, offset)
    return matvec_weight(x, weight, impl=impl)
