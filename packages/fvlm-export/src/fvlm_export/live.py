"""What a live model holds, by the names of the model without PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fvlm_export.adapters import has_adapters, module_name
from fvlm_export.quantized import is_quantized

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens_")


@dataclass(frozen=True)
class LiveModel:
    """A model in memory, looked through PEFT.

    Attributes:
        outer: what the user holds.
        base: the transformers model in it (with PEFT's layers, if it has any).
        tensors: base parameters and persistent buffers; both names of tied ones.
        quantized: modules whose weight is held in 4 or 8 bit.
        adapted: whether PEFT layers are in it.
    """

    outer: nn.Module
    base: PreTrainedModel
    tensors: dict[str, torch.Tensor]
    quantized: dict[str, nn.Module]
    adapted: bool

    @property
    def four_bit(self) -> bool:
        """Whether any weight is held in 4 bit."""
        return any(type(module.weight).__name__ == "Params4bit" for module in self.quantized.values())


def look_at(model: Any) -> LiveModel:
    """Collect a model's base weights; nothing is copied."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tensors: dict[str, torch.Tensor] = {}
    quantized: dict[str, nn.Module] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        if any(part.startswith(_OF_ADAPTERS) for part in path.split(".")):
            continue
        name = module_name(path)
        held = dict(module._parameters)
        held.update({k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set})
        for leaf, tensor in held.items():
            if tensor is not None and not leaf.startswith(_OF_ADAPTERS):
                tensors[f"{name}.{leaf}" if name else leaf] = tensor
        if is_quantized(module):
            quantized[name] = module
    return LiveModel(model, base, tensors, quantized, has_adapters(base))
