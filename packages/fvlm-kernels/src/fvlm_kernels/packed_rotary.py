"""``vision_rotary`` of a fused projection: queries, keys and values out of one tensor, and one gradient back into it.

Maths and numerics are those of :func:`.vision_rotary` on the first two thirds; the values are the last third as it is.
The gradient is written where it belongs: the kernel that rotates the gradients of queries and keys back puts them into
the projection's gradient at once, instead of into tensors of their own that are joined afterwards. Nothing but cos and
sin is saved. Two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

from ._launch import Impl, use_triton
from ._library import first_derivative_only, register
from ._rotation import Pair, check_rotation, rotate_into
from .rotary import vision_rotary

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Return ``(S, H, D)`` as the kernel takes it, ``(1, H, S, D)``."""
    return x.transpose(0, 1).unsqueeze(0)


def _turn(q: torch.Tensor, k: torch.Tensor, tables: Pair, backward: bool, outs: Pair) -> None:
    cos, sin = (table[None, None] for table in tables)
    q_out, k_out = (_heads_first(x) for x in outs)
    rotate_into(_heads_first(q), _heads_first(k), (cos, sin), ((), False, False, backward), (q_out, k_out))


def _packed_fwd(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (qkv.new_empty(qkv.shape[0], *qkv.shape[2:]) for _ in range(2))
    _turn(qkv[:, 0], qkv[:, 1], (cos, sin), False, (q, k))
    return q, k


def _packed_bwd(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    dqkv = dq.new_empty(dq.shape[0], 3, *dq.shape[1:])
    _turn(dq, dk, (cos, sin), True, (dqkv[:, 0], dqkv[:, 1]))
    dqkv[:, 2].copy_(dv)
    return dqkv


_fwd_op = register(
    "packed_rotary_fwd(Tensor qkv, Tensor cos, Tensor sin) -> (Tensor q, Tensor k)",
    _packed_fwd,
    lambda qkv, cos, sin: tuple(qkv.new_empty(qkv.shape[0], *qkv.shape[2:]) for _ in range(2)),
)
_bwd_op = register(
    "packed_rotary_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    _packed_bwd,
    lambda dq, dk, dv, cos, sin: dq.new_empty(dq.shape[0], 3, *dq.shape[1:]),
)


class _PackedRotation(torch.autograd.Function):
    """q, k and v of ``(S, 3, H, D)``; v shares its memory."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Three:
        ctx.save_for_backward(cos, sin)
        q, k = _fwd_op(qkv, cos, sin)
        return q, k, qkv[:, 2]

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> Any:
        return _bwd_op(dq, dk, dv, *ctx.saved_tensors), None, None


def packed_vision_rotary(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: Impl | None = None) -> Three:
    """Take queries, keys and values out of a fused projection of packed patches, the first two rotated in fp32.

    Args:
        qkv: ``(S, 3, H, D)``, floating and contiguous: what the projection gave, seen as three times H heads.
        cos: ``(S, R)`` with even R ≤ D, of any floating dtype; the row's and the column's frequencies already joined.
        sin: like ``cos``.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        q, k and v, ``(S, H, D)`` each, of ``qkv``'s dtype; v shares the memory of ``qkv``: do not change it in place.

    Raises:
        ValueError: shapes or devices do not fit, or cos or sin requires a gradient.
        TypeError: a dtype is not floating, or cos and sin differ in it.

    Example:
        >>> q, k, v = packed_vision_rotary(projection(x).view(len(x), 3, heads, -1), *position_embeddings)
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"packed_vision_rotary: qkv has shape {tuple(qkv.shape)}; it must be (S, 3, H, D)")
    if cos.dim() != 2 or cos.shape[-1] % 2 or cos.shape[-1] > qkv.shape[-1]:
        raise ValueError(
            f"packed_vision_rotary: cos has shape {tuple(cos.shape)}; it must be (S, R), R even and at most"
            f" {qkv.shape[-1]}"
        )
    q, k, v = qkv.unbind(1)
    check_rotation("packed_vision_rotary", _heads_first(q), _heads_first(k), cos[None], sin[None])
    if not use_triton(impl, qkv, cos):
        return *vision_rotary(q, k, cos, sin, impl="torch"), v
    made: Three = _PackedRotation.apply(qkv, cos, sin)
    return made
