"""Rotary position embedding by positions on three axes: time, height and width.

Maths and gradients are those of ``rotary``, with cos and sin of channel j of a half taken from one of three tables:

* consecutive sections (Qwen2-VL, Qwen2.5-VL): time for the first ``sections[0]`` channels, then height for
  ``sections[1]``, then width for ``sections[2]``;
* interleaved (Qwen3-VL): height where j mod 3 = 1 and j < 3·sections[1], width where j mod 3 = 2 and
  j < 3·sections[2], time elsewhere.

Sources: Wang et al., Qwen2-VL, 2024, for sections; the Qwen3-VL configuration's ``mrope_interleaved`` for the other.

Numerics are those of ``rotary``. The tables are read where they lie: nothing is gathered beforehand. Two runs give the
same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._launch import Impl, use_triton
from ._rotation import Pair, check_rotation, rotate, rotate_ref


def _ref(table: torch.Tensor, sections: Sequence[int], interleaved: bool) -> torch.Tensor:
    """Choose the position axis of every channel: ``(3, B, S, R or R/2)`` to ``(B, S, R)``."""
    half = sum(sections)
    if interleaved:
        axes = [j % 3 if j < 3 * sections[j % 3] else 0 for j in range(half)]
    else:
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    columns = torch.arange(half, device=table.device).repeat(2)
    if table.shape[-1] == 2 * half:
        columns = torch.arange(2 * half, device=table.device)
    chosen: torch.Tensor = table[torch.tensor(axes * 2, device=table.device), :, :, columns]
    return chosen.permute(1, 2, 0)


def multimodal_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sections: Sequence[int],
    *,
    interleaved: bool = False,
    impl: Impl | None = None,
) -> Pair:
    """Rotate queries and keys by positions on three axes, choosing each channel's axis inside the kernel.

    Args:
        q: ``(B, H, S, D)``, floating; any strides.
        k: ``(B, Hkv, S, D)``, same dtype.
        cos: ``(3, B or 1, S, R/2)``, one value a frequency, or ``(3, B or 1, S, R)``, the frequencies twice; R ≤ D.
        sin: like ``cos``.
        sections: frequencies of time, height and width (the configurations' ``mrope_section``); their sum is R/2.
        interleaved: ``False`` for consecutive sections (Qwen2-VL, Qwen2.5-VL), ``True`` for Qwen3-VL's order.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        the rotated queries and keys in the inputs' shapes, and the promoted dtype of ``q`` and ``cos``.

    Raises:
        ValueError: shapes, sections or devices do not fit, or cos or sin requires a gradient.
        TypeError: a dtype is not floating, or q and k or cos and sin differ in it.

    Example:
        >>> q, k = multimodal_rotary(q, k, cos, sin, sections=[16, 24, 24])
    """
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 4 or cos.shape[0] != 3:
        raise ValueError(
            f"multimodal_rotary: q, k and cos have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(cos.shape)};"
            " they must be (B, H, S, D), (B, Hkv, S, D) and (3, B, S, R)"
        )
    half = sum(sections)
    if len(sections) != 3 or min(sections) < 1 or cos.shape[-1] not in (half, 2 * half) or 2 * half > q.shape[-1]:
        raise ValueError(
            f"multimodal_rotary: sections is {list(sections)} with {cos.shape[-1]} channels of cos and {q.shape[-1]} of"
            " q; it must be three positive counts whose sum is the number of frequencies"
        )
    check_rotation("multimodal_rotary", q, k, cos, sin)
    if use_triton(impl, q, cos):
        return rotate(q, k, cos, sin, sections, interleaved)
    cos, sin = (_ref(table, sections, interleaved) for table in (cos, sin))
    return rotate_ref(q, k, cos, sin, fp32_inside=False)
