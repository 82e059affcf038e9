"""The rotation that all rotary ops share: its PyTorch form, kernel, operator, gradient and checks.

Maths, for each token and head, over the R rotated of D channels in two halves x₁ and x₂ (channels from R on are
copied), with the halves c₁, c₂ of cos and s₁, s₂ of sin at the token's position::

    y₁ = x₁ c₁ − x₂ s₁
    y₂ = x₂ c₂ + x₁ s₂

Gradients (cos and sin get none)::

    dx₁ = dy₁ c₁ + dy₂ s₂
    dx₂ = dy₂ c₂ − dy₁ s₁

The kernel also takes cos and sin for three position axes and chooses each channel's; see ``multimodal_rotary``.

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._launch import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    launch,
    next_power_of_two,
)
from ._library import first_derivative_only, register
from ._triton import tl, triton

Pair = tuple[torch.Tensor, torch.Tensor]
TILE = 2048
"""Channels of one half that a program holds at a time, over all heads of the tile."""


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``(..., D)`` by cos and sin that broadcast against its first R channels."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest.to(turned.dtype)), dim=-1) if rest.shape[-1] else turned


def rotate_ref(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, fp32_inside: bool) -> Pair:
    """Rotate ``(B, H, S, D)`` by ``(B or 1, S, R)`` in plain PyTorch; float64 stays float64."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if not fp32_inside:
        return _turn(q, cos, sin), _turn(k, cos, sin)
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return _turn(q.to(wide), cos, sin).to(q.dtype), _turn(k.to(wide), cos, sin).to(k.dtype)


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    stride_x,
    stride_y,
    cos1,
    cos2,
    sin1,
    sin2,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Rotate all heads of one token, whose channels of head h start at ``x_ptr + h * stride_x``."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_t = tl.arange(0, BLOCK_T)
    out = y_ptr.dtype.element_ty
    for start in tl.static_range(0, HEADS, BLOCK_H):
        offs_h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
        mask = (offs_h < HEADS)[:, None] & (offs_r < HALF)[None, :]
        x_at = x_ptr + offs_h[:, None] * stride_x + offs_r[None, :]
        y_at = y_ptr + offs_h[:, None] * stride_y + offs_r[None, :]
        x1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
        a1 = x1 * cos1[None, :]
        b1 = x2 * sin1[None, :]
        a2 = x2 * cos2[None, :]
        b2 = x1 * sin2[None, :]
        if ROUND:
            a1 = a1.to(out).to(tl.float32)
            b1 = b1.to(out).to(tl.float32)
            a2 = a2.to(out).to(tl.float32)
            b2 = b2.to(out).to(tl.float32)
        tl.store(y_at, (a1 - b1).to(out), mask=mask)
        tl.store(y_at + HALF, (a2 + b2).to(out), mask=mask)
        if TAIL > 0:
            tail_mask = (offs_h < HEADS)[:, None] & (offs_t < TAIL)[None, :]
            tail_at = offs_h[:, None] * stride_x + 2 * HALF + offs_t[None, :]
            tail = tl.load(x_ptr + tail_at, mask=tail_mask, other=0.0)
            tl.store(y_ptr + offs_h[:, None] * stride_y + 2 * HALF + offs_t[None, :], tail.to(out), mask=tail_mask)


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_qob,
    stride_qoh,
    stride_qos,
    stride_kob,
    stride_koh,
    stride_kos,
    stride_ca,
    stride_cb,
    stride_cs,
    S,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    SECOND: tl.constexpr,
    SECTION_0: tl.constexpr,
    SECTION_1: tl.constexpr,
    SECTION_2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    b = pid // S
    s = pid % S
    offs_r = tl.arange(0, BLOCK_R)
    mask = offs_r < HALF
    at = b * stride_cb + s * stride_cs + offs_r
    if SECTION_0 > 0:
        if INTERLEAVED:
            axis = tl.where((offs_r % 3 == 1) & (offs_r < 3 * SECTION_1), 1, 0)
            axis = tl.where((offs_r % 3 == 2) & (offs_r < 3 * SECTION_2), 2, axis)
        else:
            axis = tl.where(offs_r < SECTION_0, 0, tl.where(offs_r < SECTION_0 + SECTION_1, 1, 2))
        at += axis * stride_ca
    cos1 = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + at + SECOND, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + at + SECOND, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        turned1 = -sin2
        turned2 = -sin1
    else:
        turned1 = sin1
        turned2 = sin2
    q_at = q_ptr + b * stride_qb + s * stride_qs
    k_at = k_ptr + b * stride_kb + s * stride_ks
    q_out_at = q_out_ptr + b * stride_qob + s * stride_qos
    k_out_at = k_out_ptr + b * stride_kob + s * stride_kos
    _rotate_heads(
        q_at, q_out_at, stride_qh, stride_qoh, cos1, cos2, turned1, turned2,
        Q_HEADS, HALF, TAIL, ROUND, BLOCK_Q, BLOCK_R, BLOCK_T,
    )  # fmt: skip
    _rotate_heads(
        k_at, k_out_at, stride_kh, stride_koh, cos1, cos2, turned1, turned2,
        K_HEADS, HALF, TAIL, ROUND, BLOCK_K, BLOCK_R, BLOCK_T,
    )  # fmt: skip


def _heads_at_once(heads: int) -> int:
    """Return how many heads a program turns at a time: of up to 16, such as 12, no more than are there."""
    whole = next_power_of_two(heads)
    return whole // 2 if heads < whole <= 16 and heads > 2 else whole


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sections: Sequence[int],
    interleaved: bool,
    round_products: bool,
    backward: bool,
    out_dtype: torch.dtype,
) -> Pair:
    """Launch; q and k are ``(B, H, S, D)``, cos and sin ``(1 or 3, B or 1, S, R or R/2)``."""
    q_out, k_out = torch.empty_like(q, dtype=out_dtype), torch.empty_like(k, dtype=out_dtype)
    rotate_into(q, k, (cos, sin), (sections, interleaved, round_products, backward), (q_out, k_out))
    return q_out, k_out


def rotate_into(
    q: torch.Tensor, k: torch.Tensor, tables: Pair, how: tuple[Sequence[int], bool, bool, bool], outs: Pair
) -> None:
    """Launch as `_rotary` does, into given memory of q's and k's shapes whose last dimension is dense."""
    (cos, sin), (q_out, k_out), (sections, interleaved, round_products, backward) = tables, outs, how
    q, k, cos, sin = _dense_last(q), _dense_last(k), cos.contiguous(), sin.contiguous()
    batch, heads, length, width = q.shape
    half = sum(sections) or cos.shape[-1] // 2
    block_r, tail = next_power_of_two(half), width - 2 * half
    most = max(1, TILE // block_r)
    launch(
        _rotary_kernel,
        (batch * length,),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        *q.stride()[:3],
        *k.stride()[:3],
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        cos.stride(0),
        cos.stride(1) if cos.shape[1] > 1 else 0,
        cos.stride(2),
        length,
        Q_HEADS=heads,
        K_HEADS=k.shape[1],
        HALF=half,
        TAIL=tail,
        SECOND=half if cos.shape[-1] > half else 0,  # a table of R/2 channels serves both halves
        **{f"SECTION_{axis}": sections[axis] if sections else 0 for axis in range(3)},
        INTERLEAVED=interleaved,
        ROUND=round_products,
        BACKWARD=backward,
        BLOCK_Q=min(_heads_at_once(heads), most),
        BLOCK_K=min(_heads_at_once(k.shape[1]), most),
        BLOCK_R=block_r,
        BLOCK_T=next_power_of_two(tail),
        num_warps=1 if block_r >= 128 else 4,
        # LLVM narrows a rounded product of two bf16 numbers to bf16's own multiplication, which ptxas would contract
        # with the sum after it to one rounding: on an H100 22 % of the elements were another number than eager's.
        enable_fp_fusion=not round_products,
    )


_op = register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int[] sections, bool interleaved, bool round_products,"
    " bool backward, ScalarType out_dtype) -> (Tensor q_out, Tensor k_out)",
    _rotary,
    lambda q, k, cos, sin, sections, interleaved, round_products, backward, out_dtype: (
        torch.empty_like(q, dtype=out_dtype),
        torch.empty_like(k, dtype=out_dtype),
    ),
)


class _Rotation(torch.autograd.Function):
    """The rotation, whose gradient is the rotation back."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        sections: list[int],
        interleaved: bool,
        fp32_inside: bool,
    ) -> Pair:
        ctx.save_for_backward(cos, sin)
        ctx.settings, ctx.dtype = (sections, interleaved), q.dtype
        out_dtype = q.dtype if fp32_inside else torch.promote_types(q.dtype, cos.dtype)
        both: Pair = _op(q, k, cos, sin, sections, interleaved, not fp32_inside, False, out_dtype)
        return both

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        grads = _op(dq, dk, *ctx.saved_tensors, *ctx.settings, False, True, ctx.dtype)
        return (*grads, None, None, None, None, None)


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sections: Sequence[int] = (),
    interleaved: bool = False,
    fp32_inside: bool = False,
) -> Pair:
    """Rotate ``(B, H, S, D)`` by ``(1 or 3, B or 1, S, R or R/2)`` with the kernel; nothing is checked."""
    rotated: Pair = _Rotation.apply(q, k, cos, sin, list(sections), interleaved, fp32_inside)
    return rotated


def check_rotation(op: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Check ``(B, H, S, D)`` against ``(axes, B or 1, S, R)``."""
    check_floating(op, q=q, k=k, cos=cos, sin=sin)
    check_same_device(op, q=q, k=k, cos=cos, sin=sin)
    check_same_dtype(op, q=q, k=k)
    check_same_dtype(op, cos=cos, sin=sin)
    check_shape(op, "k, its heads aside,", k[:, 0], q[:, 0].shape)
    check_shape(op, "sin", sin, cos.shape)
    if cos.shape[-2] != q.shape[2] or cos.shape[-3] not in (1, q.shape[0]):
        raise ValueError(
            f"{op}: cos has shape {tuple(cos.shape)}; it must cover {q.shape[2]} positions and 1 or {q.shape[0]} rows"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError(f"{op}: cos or sin requires a gradient, which this op does not compute; detach them")
