"""Rotary position embedding of queries and keys in one launch: plain, partial and vision.

Maths and gradients: :mod:`._rotation`.

Numerics. ``rotary`` rounds both products and then their sum to the promoted dtype of q and cos, as
``apply_rotary_pos_emb`` of transformers does in eager mode. ``vision_rotary`` computes in fp32 and rounds once, as
``apply_rotary_pos_emb_vision`` does. Backward computes in fp32 and rounds once. Outputs keep the order of the inputs'
strides. Nothing but cos and sin is saved. Two runs give the same bits.
"""

from __future__ import annotations

import torch

from ._launch import Impl, use_triton
from ._rotation import Pair, check_rotation, rotate, rotate_ref


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads_dim: int = 1,
    impl: Impl | None = None,
) -> Pair:
    """Rotate queries and keys, as ``apply_rotary_pos_emb`` of Llama, Qwen, Gemma, mllama and Pixtral does.

    Args:
        q: ``(B, H, S, D)``, or ``(B, S, H, D)`` with ``heads_dim=2``; floating, any strides.
        k: ``(B, Hkv, S, D)`` or ``(B, S, Hkv, D)``; same dtype.
        cos: ``(B, S, R)``, ``(1, S, R)`` or ``(S, R)`` with even R ≤ D: channels from R on are copied.
        sin: like ``cos``.
        heads_dim: where the heads are, 1 or 2 (transformers' ``unsqueeze_dim``).
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        the rotated queries and keys in the inputs' shapes, and the promoted dtype of ``q`` and ``cos``.

    Raises:
        ValueError: shapes or devices do not fit, or cos or sin requires a gradient.
        TypeError: a dtype is not floating, or q and k or cos and sin differ in it.

    Example:
        >>> q, k = rotary(q, k, *rotary_emb(hidden, position_ids))
    """
    if q.dim() != 4 or k.dim() != 4 or heads_dim not in (1, 2):
        raise ValueError(
            f"rotary: q has {q.dim()} and k {k.dim()} dimensions and heads_dim is {heads_dim}; they must be 4, 4, and"
            " 1 or 2"
        )
    if cos.dim() not in (2, 3) or cos.shape[-1] % 2 or cos.shape[-1] > q.shape[-1]:
        raise ValueError(
            f"rotary: cos has shape {tuple(cos.shape)}; it must be (rows, positions, R) or (positions, R), R even and"
            f" at most {q.shape[-1]}"
        )
    if heads_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    check_rotation("rotary", q, k, cos, sin)
    if use_triton(impl, q, cos):
        q, k = rotate(q, k, cos.unsqueeze(0), sin.unsqueeze(0))
    else:
        q, k = rotate_ref(q, k, cos, sin, fp32_inside=False)
    return (q.transpose(1, 2), k.transpose(1, 2)) if heads_dim == 2 else (q, k)


def vision_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: Impl | None = None
) -> Pair:
    """Rotate the queries and keys of packed patches in fp32, as ``apply_rotary_pos_emb_vision`` does.

    Args:
        q: ``(S, H, D)``, floating; any strides, such as a slice of a fused QKV projection.
        k: ``(S, Hkv, D)``, same dtype.
        cos: ``(S, R)`` with even R ≤ D, of any floating dtype; the row's and the column's frequencies already joined.
        sin: like ``cos``.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        the rotated queries and keys in the inputs' shapes and dtype.

    Raises:
        ValueError: shapes or devices do not fit, or cos or sin requires a gradient.
        TypeError: a dtype is not floating, or q and k or cos and sin differ in it.

    Example:
        >>> q, k = vision_rotary(q, k, *position_embeddings)
    """
    if q.dim() != 3 or k.dim() != 3 or cos.dim() != 2 or cos.shape[-1] % 2 or cos.shape[-1] > q.shape[-1]:
        raise ValueError(
            f"vision_rotary: q, k and cos have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(cos.shape)}; they"
            " must be (S, H, D), (S, Hkv, D) and (S, R), R even and at most D"
        )
    q, k = q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0)
    cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    check_rotation("vision_rotary", q, k, cos, sin)
    if use_triton(impl, q, cos):
        q, k = rotate(q, k, cos.unsqueeze(0), sin.unsqueeze(0), fp32_inside=True)
    else:
        q, k = rotate_ref(q, k, cos, sin, fp32_inside=True)
    return q.squeeze(0).transpose(0, 1), k.squeeze(0).transpose(0, 1)
