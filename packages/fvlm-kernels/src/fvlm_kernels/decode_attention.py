"""Attention of one new token a sequence over a cache of fixed size, as much of it as is filled.

Maths, for sequence s and a query head h that shares the keys of head h // groups::

    y = softmax(scale · q Kᵀ over the columns c that are seen) V
    c is seen when c < length, c ≥ length - window (with a window), and visible[s, c] (where that is given)

There is no gradient: this is for decoding. ``length`` is read on the device, so that a recording of the launches serves
every length up to the cache's capacity, and what lies behind it is not read. The token's own key and value may be given
apart: they are written to column length - 1 by the launch that reads the rest, which saves one for each of them.

Numerics. Scores, softmax and both sums are in fp32; weights are rounded to V's dtype for the second product, as flash
attention does. The columns are dealt out to programs by length and capacity alone, whose partial results are joined in
a fixed order: two runs give the same bits. A sequence that sees no column gets NaN, as from torch.
"""

# mypy: allow-untyped-defs
# (for the kernels, whose arguments Triton types)

from __future__ import annotations

import torch

from ._launch import (
    Impl,
    cdiv,
    check_floating,
    check_same_device,
    check_same_dtype,
    launch,
    next_power_of_two,
    use_triton,
    without_autocast,
)
from ._library import register
from ._triton import tl, triton

BLOCK_C = 64
MOST_SPLITS = 32


def _ref(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    visible: torch.Tensor | None,
    window: int,
    scale: float,
) -> torch.Tensor:
    """The module's maths in plain PyTorch, for a cache that holds the token's own key and value."""
    groups = q.shape[1] // keys.shape[1]
    columns = torch.arange(keys.shape[2], device=q.device)
    seen = (columns < length)[None]
    if window:
        seen = seen & (columns >= length - window)
    if visible is not None:
        seen = seen & visible
    grouped = q.unflatten(1, (keys.shape[1], groups))
    scores = torch.einsum("bhgd,bhcd->bhgc", grouped, keys) * scale
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.to(wide).masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bhgc,bhcd->bhgd", weights.to(values.dtype), values).flatten(1, 2)


@triton.jit
def _partial_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    new_k_ptr,
    new_v_ptr,
    visible_ptr,
    length_ptr,
    acc_ptr,
    top_ptr,
    total_ptr,
    scale,
    stride_kb,
    stride_kh,
    stride_kc,
    stride_vb,
    stride_vh,
    stride_vc,
    stride_nkb,
    stride_nkh,
    stride_nvb,
    stride_nvh,
    stride_visible,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    APPENDS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = (pair // HEADS).to(tl.int64)
    head = (pair % HEADS).to(tl.int64)
    length = tl.load(length_ptr).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0)
    begin = first // BLOCK_C
    held = length  # columns that the cache holds already
    if APPENDS:
        held = length - 1
    share = tl.cdiv(tl.cdiv(held, BLOCK_C) - begin, SPLITS)
    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    mask_gd = (offs_g < GROUPS)[:, None] & (offs_d < D)[None, :]
    q = tl.load(q_ptr + (pair * GROUPS + offs_g)[:, None] * D + offs_d[None, :], mask=mask_gd, other=0.0)
    top = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    if APPENDS:  # the first program of a head begins with the token itself, and keeps it
        mask_d = offs_d < tl.where(split == 0, D, 0)
        own_k = tl.load(new_k_ptr + batch * stride_nkb + head * stride_nkh + offs_d, mask=mask_d, other=0.0)
        own_v = tl.load(new_v_ptr + batch * stride_nvb + head * stride_nvh + offs_d, mask=mask_d, other=0.0)
        tl.store(
            k_ptr + batch * stride_kb + head * stride_kh + held.to(tl.int64) * stride_kc + offs_d, own_k, mask=mask_d
        )
        tl.store(
            v_ptr + batch * stride_vb + head * stride_vh + held.to(tl.int64) * stride_vc + offs_d, own_v, mask=mask_d
        )
        score = tl.sum(q.to(tl.float32) * own_k.to(tl.float32)[None, :], axis=1) * scale
        top = tl.where(split == 0, score, top)
        total = tl.where(split == 0, total + 1.0, total)
        acc += own_v.to(tl.float32)[None, :]
    block = begin + split * share
    end = block + share
    while block < end:  # not a range: the interpreter takes no tensor for its bound
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        seen = (offs_c < held) & (offs_c >= first)
        if MASKED:
            seen = seen & (tl.load(visible_ptr + batch * stride_visible + offs_c, mask=seen, other=0) != 0)
        mask_cd = seen[:, None] & (offs_d < D)[None, :]
        at_k = batch * stride_kb + head * stride_kh + offs_c[:, None].to(tl.int64) * stride_kc + offs_d[None, :]
        k = tl.load(k_ptr + at_k, mask=mask_cd, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        at_v = batch * stride_vb + head * stride_vh + offs_c[:, None].to(tl.int64) * stride_vc + offs_d[None, :]
        v = tl.load(v_ptr + at_v, mask=mask_cd, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
        block += 1
    at = (pair * SPLITS + split) * GROUPS + offs_g
    tl.store(acc_ptr + at[:, None] * D + offs_d[None, :], acc, mask=mask_gd)
    tl.store(top_ptr + at, top, mask=offs_g < GROUPS)
    tl.store(total_ptr + at, total, mask=offs_g < GROUPS)


@triton.jit
def _join_kernel(
    acc_ptr,
    top_ptr,
    total_ptr,
    y_ptr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask_s = offs_s < SPLITS
    mask_d = offs_d < D
    at = (row // GROUPS * SPLITS + offs_s) * GROUPS + row % GROUPS
    top = tl.load(top_ptr + at, mask=mask_s, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=mask_s, other=0.0)
    highest = tl.max(top)
    share = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    acc = tl.load(acc_ptr + at[:, None] * D + offs_d[None, :], mask=mask_s[:, None] & mask_d[None, :], other=0.0)
    y = tl.sum(acc * share[:, None], axis=0) / tl.sum(total * share)
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    visible: torch.Tensor | None,
    window: int,
    scale: float,
    new_key: torch.Tensor | None = None,
    new_value: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, heads_q, d = q.shape
    heads, capacity = keys.shape[1:3]
    pairs, block_d = batch * heads, max(16, next_power_of_two(d))
    block_c = BLOCK_C if block_d <= 128 else BLOCK_C // 2  # wider heads would spill registers
    groups, splits = heads_q // heads, min(MOST_SPLITS, cdiv(capacity, block_c))
    q = q.contiguous()
    acc = torch.empty((pairs, splits, groups, d), dtype=torch.float32, device=q.device)
    top, total = (torch.empty((pairs, splits, groups), dtype=torch.float32, device=q.device) for _ in range(2))
    y = torch.empty_like(q)
    launch(
        _partial_kernel,
        (pairs, splits),
        q,
        keys,
        values,
        new_key,
        new_value,
        visible,
        length,
        acc,
        top,
        total,
        scale,
        *keys.stride()[:3],
        *values.stride()[:3],
        *((0, 0) if new_key is None else new_key.stride()[:2]),
        *((0, 0) if new_value is None else new_value.stride()[:2]),
        0 if visible is None else visible.stride(0),
        HEADS=heads,
        GROUPS=groups,
        D=d,
        SPLITS=splits,
        WINDOW=window,
        MASKED=visible is not None,
        APPENDS=new_key is not None,
        BLOCK_G=max(16, next_power_of_two(groups)),
        BLOCK_D=block_d,
        BLOCK_C=block_c,
        num_warps=4,
    )
    launch(
        _join_kernel,
        (batch * heads_q,),
        acc,
        top,
        total,
        y,
        GROUPS=groups,
        D=d,
        SPLITS=splits,
        BLOCK_D=block_d,
        BLOCK_S=next_power_of_two(splits),
        num_warps=4,
    )
    return y


def _attend_to_more(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    visible: torch.Tensor | None,
    window: int,
    scale: float,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
) -> torch.Tensor:
    return _attend(q, keys, values, length, visible, window, scale, new_key, new_value)


_op = register(
    "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor length, Tensor? visible, int window, float scale)"
    " -> Tensor",
    _attend,
    lambda q, keys, values, length, visible, window, scale: torch.empty_like(q, memory_format=torch.contiguous_format),
)
_append_op = register(
    "decode_attention_(Tensor q, Tensor(a!) keys, Tensor(b!) values, Tensor length, Tensor? visible, int window,"
    " float scale, Tensor new_key, Tensor new_value) -> Tensor",
    _attend_to_more,
    lambda q, keys, values, length, visible, window, scale, new_key, new_value: torch.empty_like(
        q, memory_format=torch.contiguous_format
    ),
)


def _check(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, visible: torch.Tensor | None
) -> None:
    check_floating("decode_attention", q=q, keys=keys, values=values)
    check_same_dtype("decode_attention", q=q, keys=keys, values=values)
    check_same_device("decode_attention", q=q, keys=keys, values=values, length=length, visible=visible)
    if q.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or keys.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}; they must "
            "be (batch, heads, head_dim) and twice (batch, key heads, capacity, head_dim)"
        )
    if q.shape[0] != keys.shape[0] or not keys.shape[1] or q.shape[1] % keys.shape[1]:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)} does not share the heads of keys {tuple(keys.shape)}; the batch "
            "must be the same and the heads a multiple"
        )
    if length.numel() != 1 or length.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"decode_attention: length is {length.dtype} {tuple(length.shape)}; it must be one integer, int64 or int32"
        )
    if visible is not None and (visible.shape != (keys.shape[0], keys.shape[2]) or visible.dtype != torch.bool):
        raise ValueError(
            f"decode_attention: visible is {visible.dtype} {tuple(visible.shape)}; it must be bool (batch, capacity)"
        )


def _check_new(keys: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor]) -> None:
    for tensor in new:
        if tensor.shape != (keys.shape[0], keys.shape[1], keys.shape[3]):
            raise ValueError(
                f"decode_attention: a new key or value has shape {tuple(tensor.shape)}; with keys "
                f"{tuple(keys.shape)} it must be (batch, key heads, head_dim)"
            )
        check_same_dtype("decode_attention", keys=keys, new=tensor)
        check_same_device("decode_attention", keys=keys, new=tensor)


def _runs_triton(
    impl: Impl | None,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor] | None,
) -> bool:
    in_rows = all(tensor.stride(-1) == 1 for tensor in (keys, values, *(new or ())))
    return use_triton(impl, q) and q.numel() > 0 and in_rows


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    *,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Attend from one token a sequence to a cache; see the module for maths and numerics.

    Args:
        q: ``(batch, heads, head_dim)``, floating.
        keys: ``(batch, key heads, capacity, head_dim)`` of the same dtype, the last dimension contiguous; heads are a
            multiple of key heads.
        values: likewise.
        length: one integer, int64 or int32, on the same device: how many columns of the cache are filled, the token's
            own included.
        new: the token's own key and value, ``(batch, key heads, head_dim)`` each, where the cache does not hold them
            yet; they are written to its column ``length - 1``.
        visible: ``(batch, capacity)`` bool, False for columns that a sequence does not see (its padding); None: all.
        window: how many of the last columns are seen; None: all.
        scale: what scores are multiplied by; None: ``head_dim ** -0.5``.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``(batch, heads, head_dim)`` in ``q``'s dtype.

    Raises:
        ValueError: shapes or devices do not fit, or ``window`` is not above 0.
        TypeError: a dtype does not fit.

    Example:
        >>> y = decode_attention(q, keys, values, torch.tensor([n + 1], device=q.device), new=(k, v))
    """
    _check(q, keys, values, length, visible)
    if window is not None and window <= 0:
        raise ValueError(f"decode_attention: window is {window}; it must be above 0, or None for no window")
    if new is not None:
        _check_new(keys, new)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not _runs_triton(impl, q, keys, values, new):
        if new is not None:
            for cache, value in zip((keys, values), new, strict=True):
                cache.index_copy_(2, length.view(1) - 1, value.unsqueeze(2))
        with without_autocast(q):  # which the kernel does not know either
            return _ref(q, keys, values, length, visible, window or 0, scale)
    visible = visible if visible is None or visible.stride(-1) == 1 else visible.contiguous()
    given = q, keys, values, length, visible, window or 0, scale
    y: torch.Tensor = _op(*given) if new is None else _append_op(*given, *new)
    return y
