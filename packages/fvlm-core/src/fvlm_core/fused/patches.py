"""The patch embedding: a convolution whose stride is its kernel, as the matrix product that it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fvlm_kernels import patch_embed


def patch_embed_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """Embed ``(patches, channels · frames · height · width)`` as Qwen's vision towers do: ``(patches, hidden)``."""
    weight = module.proj.weight
    patches = hidden_states.to(weight.dtype).view(-1, *weight.shape[1:])
    return patch_embed(patches, weight, module.proj.bias).view(-1, weight.shape[0])
