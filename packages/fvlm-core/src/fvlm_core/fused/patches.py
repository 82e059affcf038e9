"""The patch embedding: a convolution whose stride is its kernel, as the matrix product that it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fvlm_kernels import patch_embed


def patch_embed_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """Embed ``(patches, channels · frames · height · width)`` as Qwen's vision towers do: ``(patches, hidden)``."""
    weight = module.proj.weight
    patches = hidden_states.to(weight.dtype).view(-1, *weight.shape[1:])
    return patch_embed(patches, weight, module.proj.bias).view(-1, weight.shape[0])


def patch_conv_forward(module: Any, pixel_values: Tensor) -> Tensor:
    """Embed ``(images, channels, height, width)`` as a convolution does: ``(images, hidden, rows, columns)``."""
    return patch_embed(pixel_values, module.weight, module.bias).movedim(-1, 1)


def patch_conv_unfit(module: nn.Module) -> str | None:
    """Say why a convolution is no patch embedding, or None."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.dilation != (1, 1):
        return "is no plain convolution"
    padded = module.padding not in ("valid", (0, 0))
    return "has overlapping or padded patches" if padded or module.stride != module.kernel_size else None
