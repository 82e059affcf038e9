"""The patch embedding, a convolution whose stride equals its kernel, as one matrix product.

Maths. Patches do not overlap, so each output position reads its own block of the input. With x cut into blocks of the
kernel's size and each block (channels first) laid out as one row of K = C · Π kernel numbers::

    y = blocks · weightᵀ + bias,        blocks (B · Π grid, K), weight (E, K)

Gradients are those of the matrix product: dblocks = dy · weight, dweight = dyᵀ · blocks, dbias = Σ dy, with dblocks
put back where it was cut from. What the stride leaves over at the far edges is not read, as in a convolution, and its
gradient is zero.

Numerics. The product runs in the inputs' dtype with the accumulation of ``torch.nn.functional.linear`` (fp32 for
16-bit dtypes), and rounds once, as ``torch.nn.Conv2d`` and ``Conv3d`` do; only the order of the sum may differ. When x
comes as one patch a row (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) the cutting is a view and the product is all there is. There
is no kernel of our own here: what wins is not to call the convolution. Two runs on one device give the same bits where
its matrix products do (cuBLAS does, on one stream).
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from ._launch import check_floating, check_same_device, check_shape


def _cut(x: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """Cut ``(B, C, *space)`` into ``(B, *grid, C, *kernel)``; a view of what the stride reaches."""
    for axis, size in enumerate(kernel, start=2):
        x = x.narrow(axis, 0, x.shape[axis] // size * size)
    for axis, size in enumerate(kernel):
        x = x.unflatten(2 + 2 * axis, (-1, size))  # (B, C, g₁, k₁, g₂, k₂, …)
    grid = range(2, 2 + 2 * len(kernel), 2)
    return x.permute(0, *grid, 1, *(axis + 1 for axis in grid))


def patch_embed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Embed patches with a convolution's weight, stride equal to the kernel, no padding.

    Args:
        x: ``(B, C, *space)`` with as many spatial dimensions as the kernel has; any strides.
        weight: ``(E, C, *kernel)``, the weight of a ``Conv2d``, ``Conv3d`` or any other; same dtype as ``x``, except
            under autocast.
        bias: ``(E,)`` or ``None``.

    Returns:
        ``(B, *grid, E)``, the grid being ``space // kernel``: the convolution's output with its channels last. Where a
        model flattens the convolution's output to a sequence, ``.flatten(1, -2)`` gives the same sequence.

    Raises:
        ValueError: shapes or devices do not fit, or a spatial dimension is smaller than the kernel.
        TypeError: a dtype is not floating.

    Example:
        >>> hidden = patch_embed(pixels.view(-1, 3, 2, 14, 14), proj.weight).view(-1, proj.out_channels)
    """
    check_floating("patch_embed", x=x, weight=weight, bias=bias)
    check_same_device("patch_embed", x=x, weight=weight, bias=bias)
    kernel = tuple(weight.shape[2:])
    if not kernel or x.dim() != weight.dim() or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"patch_embed: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be (B, C, *space)"
            " and (E, C, *kernel) with as many dimensions"
        )
    check_shape("patch_embed", "bias", bias, weight.shape[:1])
    if any(have < need for have, need in zip(x.shape[2:], kernel, strict=True)):
        raise ValueError(f"patch_embed: x has shape {tuple(x.shape)}, smaller than one patch of {kernel}; pad it")
    patch = math.prod(weight.shape[1:])
    if tuple(x.shape[2:]) == kernel:  # one patch a row: nothing to cut
        blocks = x.reshape(x.shape[0], *(1 for _ in kernel), patch)
    else:
        blocks = _cut(x, kernel).flatten(-1 - len(kernel))
    return linear(blocks, weight.reshape(weight.shape[0], patch), bias)
