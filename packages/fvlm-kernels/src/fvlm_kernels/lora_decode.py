"""A few rows through adapted linear layers that share their input, straight from NF4 codes: the products of decoding.

Maths, for one to eight rows of x and each of up to three layers (:mod:`.lora_layer`)::

    t = x Aᵀ,      y = x Wᵀ + bias + scaling · t Bᵀ

with W decoded as in :mod:`.nf4_matvec`. There is no gradient and no dropout: this is for decoding.

Numerics. x is read in the dtypes that PEFT would compute in (:func:`.lora_layer.dtypes_for`), and A is rounded to that
of the adapter as it is read; all sums are in fp32, W and t are never rounded, and y is rounded once. The order of every
sum depends on the weight's shape alone: two runs give the same bits, and a row does not depend on the others.

A step of decoding is bound by how many launches it takes, so there are two for all layers together: one for t of all of
them, one for their products, in which a program works on a few rows of one weight and adds bias and adapter at its end.
Parameters are read where they lie: a recording of these launches sees what training changes in place.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment
# ruff: noqa: RUF005
# (for the kernels: Triton types its arguments and its growing tuples, and knows no starred ones)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._launch import Impl, cdiv, check_floating, check_same_device, launch, next_power_of_two, rows_of, use_triton
from ._library import register
from ._triton import tl, triton
from .lora_layer import LoRALinear, dtypes_for
from .lora_steps import forward
from .nf4 import cached_table, words_of
from .nf4_format import NESTED_BLOCKSIZE, NF4Weight

MAX_ROWS = 8
MAX_LAYERS = 3
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
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # Which weight, and which of its rows.
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
    # One word a thread and step: its eight codes, their values and the eight columns of x stay in registers.
    e = tl.arange(0, 8)
    sums = ()
    for _ in tl.static_range(BLOCK_N * M):
        sums = sums + (tl.zeros((BLOCK_W,), dtype=tl.float32),)
    for i in range(ITERATIONS):
        offs_w = i * BLOCK_W + tl.arange(0, BLOCK_W)
        mask_w = offs_w < WORDS
        xs = ()
        for m in tl.static_range(M):
            at_x = m * stride_x + offs_w[:, None] * 8 + e[None, :]
            xs = xs + (tl.load(x_ptr + at_x, mask=mask_w[:, None], other=0.0).to(tl.float32),)
        more = ()
        for r in tl.static_range(BLOCK_N):
            mask = mask_w & (first + r < N)
            at = (first + r).to(tl.int64) * WORDS + offs_w
            words = tl.load(packed_ptr + at, mask=mask, other=0)
            scale_at = at // (BLOCKSIZE // 8)
            if NESTED:
                q = tl.load(absmax_ptr + scale_at, mask=mask, other=0).to(tl.int32)
                nested = tl.load(nested_ptr + scale_at // NESTED_BLOCK, mask=mask, other=0.0)
                absmax = tl.load(code_ptr + q) * nested + tl.load(offset_ptr)
            else:
                absmax = tl.load(absmax_ptr + scale_at, mask=mask, other=0.0).to(tl.float32)
            # Bytes lie in order within a little-endian word, but in each byte the high half comes first.
            values = tl.load(table_ptr + ((words[:, None] >> ((e ^ 1) * 4)[None, :]) & 15))
            for m in tl.static_range(M):
                more = more + (sums[r * M + m] + tl.sum(values * xs[m], axis=1) * absmax,)
        sums = more
    offs_r = tl.arange(0, BLOCK_R)
    for r in tl.static_range(BLOCK_N):
        n = first + r
        inside = n < N
        for m in tl.static_range(M):
            y = tl.sum(sums[r * M + m])
            if BIASED:
                y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
            if RANK:
                mask_r = (offs_r < RANK) & inside
                b = tl.load(b_ptr + n * RANK + offs_r, mask=mask_r, other=0.0)
                t = tl.load(t_ptr + m * RANKS + slot * RANK + offs_r, mask=mask_r, other=0.0)
                y += scaling * tl.sum(b.to(tl.float32) * t)
            at_y = y_ptr + m * (N0 + N1 + N2) + begin + n
            tl.store(at_y, y.to(y_ptr.dtype.element_ty), mask=inside)


class _Group(NamedTuple):
    """What layers have in common that one launch computes."""

    blocksize: int
    nested: bool
    biased: bool
    rank: int
    dtypes: tuple[torch.dtype | None, ...]


def _group(layer: LoRALinear) -> _Group | None:
    """Return what a layer must share with others to be computed with them; None: the kernels do not take it."""
    base = layer.base
    if not isinstance(base, NF4Weight) or base.shape[1] % 8:
        return None
    if not torch.compiler.is_compiling() and words_of(base.packed)[1] != 8:  # a graph knows no addresses
        return None
    rank = 0 if layer.a is None else layer.a.shape[0]
    bias, b = layer.bias, layer.b
    dtypes = (None if bias is None else bias.dtype, None if b is None else b.dtype, base.absmax.dtype)
    return _Group(base.blocksize, base.nested_absmax is not None, bias is not None, rank, dtypes)


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


def _block_n(rows_of_weights: int, rows: int) -> int:
    """Return how many rows of W a program takes: as many as leave enough programs, and registers for all sums.

    How a row of y is summed does not depend on it.
    """
    return next((n for n in (4, 2) if cdiv(rows_of_weights, n) >= PROGRAMS and n * rows <= MAX_ROWS), 1)


def _products(
    x: torch.Tensor,
    narrow: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    scalings: Sequence[float],
    sizes: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch both kernels; ``tensors`` are, layer by layer, the five parts of the weight, bias, A and B."""
    layers = [tensors[i : i + 8] for i in range(0, len(tensors), 8)]
    of = [list(column) for column in zip(*layers, strict=True)]
    adapters = [a for a in of[6] if a is not None]
    rank = adapters[0].shape[0] if adapters else 0
    t = _launch_narrow(narrow, adapters) if adapters else None
    rows, k = x.shape
    words = k // 8
    y = torch.empty((rows, sum(sizes)), dtype=dtype, device=x.device)
    codes = [_aligned_words(p) for p in of[0] if p is not None]
    block_n, block_w = _block_n(sum(sizes), rows), min(256, next_power_of_two(words))

    def three(column: Sequence[Any]) -> list[Any]:
        filled = [value if value is None else value.contiguous() for value in column]
        return [filled[min(i, len(filled) - 1)] for i in range(MAX_LAYERS)]

    padded = [*sizes, 0, 0][:MAX_LAYERS]
    launch(
        _products_kernel,
        (sum(cdiv(n, block_n) for n in sizes),),
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
        BLOCK_N=block_n,
        BLOCK_W=block_w,
        num_warps=4,
    )
    return y


_op = register(
    "lora_decode(Tensor x, Tensor narrow, Tensor?[] tensors, float[] scalings, int[] sizes, int blocksize,"
    " ScalarType dtype) -> Tensor",
    _products,
    lambda x, narrow, tensors, scalings, sizes, blocksize, dtype: x.new_empty((x.shape[0], sum(sizes)), dtype=dtype),
)


def _apply(
    rows: torch.Tensor,
    layers: Sequence[LoRALinear],
    choice: tuple[torch.dtype | None, torch.dtype | None],
    triton: bool,
) -> list[torch.Tensor]:
    groups = [_group(layer) if triton else None for layer in layers]
    if len(layers) > 1 and (len(set(groups)) > 1 or len(layers) > MAX_LAYERS):
        return [y for layer in layers for y in _apply(rows, [layer], choice, triton)]
    dtypes = dtypes_for(rows, next((layer for layer in layers if layer.a is not None), layers[0]), *choice)
    if groups[0] is None:
        return forward(rows, [(layer.settings, layer.slots) for layer in layers], dtypes, False, triton)[0]
    sizes = [layer.base.shape[0] for layer in layers]
    y: torch.Tensor = _op(
        rows.to(dtypes.base),
        rows.to(dtypes.lora),
        [tensor for layer in layers for tensor in layer.slots],
        [float(layer.scaling) for layer in layers],
        sizes,
        layers[0].settings.blocksize,
        dtypes.out,
    )
    return list(y.split(sizes, dim=1))


def lora_decode(
    x: torch.Tensor,
    layers: Sequence[LoRALinear],
    *,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, ...]:
    """Apply adapted linear layers to one to eight rows; see the module for maths and numerics.

    Args:
        x: ``(..., in_features)``, floating; the dimensions before the last hold 8 rows at most.
        layers: the layers, all of ``in_features`` columns, with adapters of one dtype; NF4 bases go through the
            kernels, others through a matrix product.
        compute_dtype: of the base products; ``None``: as :func:`.lora_qkv` chooses it.
        lora_dtype: of the adapters' products; likewise.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``(..., out_features)`` of each layer, in ``x``'s dtype (under autocast around a 16- or 32-bit base in
        autocast's).

    Raises:
        ValueError: shapes or devices do not fit, there are more than 8 rows, or ``x`` asks for a gradient.
        TypeError: a dtype does not fit.

    Example:
        >>> with torch.no_grad():
        ...     q, k, v = lora_decode(token, [q_layer, k_layer, v_layer])
    """
    check_floating("lora_decode", x=x)
    if not layers:
        raise ValueError("lora_decode: there are no layers; give one at least")
    for layer in layers:
        if x.dim() == 0 or x.shape[-1] != layer.base.shape[1]:
            raise ValueError(
                f"lora_decode: x has shape {tuple(x.shape)} and a weight {tuple(layer.base.shape)}; "
                "they must be (..., K) and (N, K)"
            )
        check_same_device("lora_decode", x=x, base=layer.slots[0])
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("lora_decode: x requires a gradient, which decoding has none of; use lora_qkv")
    rows = rows_of(x) if x.numel() else x.reshape(0, x.shape[-1])
    if rows.shape[0] > MAX_ROWS:
        raise ValueError(f"lora_decode: x has {rows.shape[0]} rows; it takes up to {MAX_ROWS}, use lora_qkv")
    triton = use_triton(impl, x) and rows.shape[0] > 0
    made = _apply(rows, layers, (compute_dtype, lora_dtype), triton)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in made)
