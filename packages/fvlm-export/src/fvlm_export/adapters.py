"""What the adapters of a PEFT model change, parameter by parameter, read off PEFT's own layers.

PEFT has already worked out everything that a config can say (rank and alpha patterns, rsLoRA, which modules are
targeted, what is tied), so its layers are asked rather than the config read a second time. An adapter in a folder is
put into a skeleton first (:mod:`fvlm_export.adapter_folder`), which makes it the same case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from transformers.pytorch_utils import Conv1D

from fvlm_core.errors import ConfigError, ExportError
from fvlm_export.changes import Addition, Change, Form, LowRank, Replacement, Rows

if TYPE_CHECKING:
    from torch import nn

# Forms of LoRA whose product is more than B·A when it runs, by the name of PEFT's variant class
_MERGEABLE_VARIANTS = {
    "DoraLinearVariant",
    "DoraEmbeddingVariant",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "VeloraLinearVariant",
    "MiCALinearVariant",
    "MiCAEmbeddingVariant",
}

# Initializations that also change the base weight: their product means nothing on the original
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT layers of any kind sit in the model."""
    return any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules())


def adapters_to_merge(model: nn.Module, asked: Mapping[str, float] | None) -> dict[str, float]:
    """Return the adapters to merge and their weights: those asked for, else the active ones with weight 1.

    Raises:
        ConfigError: an adapter asked for does not exist, or none is active.
    """
    held: dict[str, Any] = dict(model.peft_config)  # type: ignore[arg-type]
    for name in asked or ():
        if name not in held:
            raise ConfigError(f"adapters names {name!r}, which the model does not hold; it holds {sorted(held)}.")
    chosen = dict(asked) if asked else dict.fromkeys(active_adapters(model), 1.0)
    if not chosen:
        raise ConfigError(f"no adapter of the model is active; call set_adapter with one of {sorted(held)}.")
    for name in chosen:
        if held[name].peft_type != "LORA":
            raise ExportError(
                f"adapter {name!r} is of type {held[name].peft_type}, which cannot be merged here; merge it with "
                "PEFT's merge_and_unload, then save the model."
            )
    return chosen


def active_adapters(model: nn.Module) -> list[str]:
    """Return the adapters that a model computes with.

    Raises:
        ConfigError: they are disabled.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            if module.disable_adapters:
                raise ConfigError("the model's adapters are disabled; call enable_adapter_layers() before merging.")
            return list(module.active_adapters)
    return [name for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for name in m.active_adapters][:1]


def changes_base(model: nn.Module, adapters: Mapping[str, float]) -> str | None:
    """Return the initialization that changed the base weights under one of the adapters, or None."""
    for name in adapters:
        init = model.peft_config[name].init_lora_weights  # type: ignore[index, union-attr]
        if base_changing(init):
            return str(init)
    return None


def base_changing(init: object) -> bool:
    """Whether a value of ``init_lora_weights`` also changes the base weights."""
    return isinstance(init, str) and init.startswith(_BASE_CHANGING)


def module_name(path: str) -> str:
    """Return a module's path in the model without PEFT: no ``base_model.model.``, no ``base_layer``, no wrapper."""
    path = path.removeprefix("base_model.model.") if path.startswith("base_model.model.") else path
    parts = path.split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter"))


def changes_of(model: nn.Module, adapters: Mapping[str, float]) -> dict[str, list[Change]]:
    """Read what the adapters change.

    Args:
        model: a PEFT model, or a model with PEFT layers injected.
        adapters: adapter name → weight; the changes of a parameter come in this order.

    Returns:
        Parameter name (of the model without PEFT) → its changes.

    Raises:
        ExportError: a layer cannot be merged: merged already, or of a form that no single weight can hold.
    """
    found: dict[str, list[Change]] = {}
    for path, module in model.named_modules():
        for adapter, weight in adapters.items():
            for param, change in _layer_changes(path, module, adapter, weight):
                found.setdefault(param, []).append(change)
    return found


def _layer_changes(path: str, module: nn.Module, adapter: str, weight: float) -> list[tuple[str, Change]]:
    name = module_name(path)
    if isinstance(module, LoraLayer):
        return _lora_changes(name, module, adapter, weight)
    if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        _only_whole(name, weight)
        state = module.modules_to_save[adapter].state_dict()
        return [(f"{name}.{key}", Replacement(value)) for key, value in state.items()]
    if isinstance(module, TrainableTokensWrapper):
        tokens = module.token_adapter
        if adapter in tokens.trainable_tokens_delta:
            _only_whole(name, weight)
            index = torch.tensor(tokens.token_indices[adapter])
            return [(f"{name}.weight", Rows(index, tokens.trainable_tokens_delta[adapter]))]
    return []


def _only_whole(name: str, weight: float) -> None:
    if weight != 1.0:
        raise ConfigError(f"{name} was trained as a whole, so its adapter merges with weight 1 only, not {weight}.")


def _lora_changes(name: str, layer: LoraLayer, adapter: str, weight: float) -> list[tuple[str, Change]]:
    embedding = isinstance(layer, Embedding)
    if adapter not in (layer.lora_embedding_A if embedding else layer.lora_A):
        return []
    _check_mergeable(name, layer, adapter)
    param = f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else f"{name}.weight"
    held: Any = layer  # PEFT's containers hold modules and parameters alike, which their annotations do not say
    a: torch.Tensor = held.lora_embedding_A[adapter] if embedding else held.lora_A[adapter].weight
    b: torch.Tensor = held.lora_embedding_B[adapter] if embedding else held.lora_B[adapter].weight
    magnitude: torch.Tensor | None = None
    if adapter in layer.lora_magnitude_vector:
        magnitude = held.lora_magnitude_vector[adapter].weight
    if magnitude is not None:
        _only_whole(f"{name} (DoRA)", weight)
    scaling = float(layer.scaling[adapter]) * weight
    experts = layer.num_experts if isinstance(layer, ParamWrapper) and layer.num_experts > 1 else None
    changes: list[tuple[str, Change]] = [(param, LowRank(a, b, scaling, _form(layer), magnitude, experts))]
    if layer.lora_bias.get(adapter):
        changes.append((f"{name}.bias", Addition(held.lora_B[adapter].bias, scaling)))
    return changes


def _check_mergeable(name: str, layer: LoraLayer, adapter: str) -> None:
    variant = layer.lora_variant.get(adapter)
    kind = None if variant is None else (variant if isinstance(variant, type) else type(variant)).__name__
    base: Any = layer.get_base_layer()
    if layer.merged:
        raise ExportError(f"{name} holds adapters merged into it already; call unmerge_adapter() before merging.")
    if kind is not None and kind not in _MERGEABLE_VARIANTS:
        raise ExportError(
            f"{name} uses {kind.removesuffix('Variant')}, which no single weight can hold; keep it as an adapter."
        )
    if isinstance(layer, MultiheadAttention):
        raise ExportError(
            f"{name} is a torch MultiheadAttention, whose adapter cannot be merged; keep it as an adapter."
        )
    if isinstance(layer, (Conv1d, Conv2d, Conv3d)) and (base.groups != 1 or set(base.dilation) != {1}):
        raise ExportError(
            f"{name} is a grouped or dilated convolution, whose adapter cannot be merged; keep it as an adapter."
        )
    if layer.lora_bias.get(adapter) and base.bias is None:
        raise ExportError(f"{name} has no bias to hold the adapter's lora_bias; keep it as an adapter.")


def _form(layer: LoraLayer) -> Form:
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        if layer.num_experts == 1:
            return Form.LINEAR
        # transformers marks experts stored as (in, out); the others are (out, in)
        return Form.EXPERTS_IN_OUT if getattr(base, "is_transposed", False) else Form.EXPERTS_OUT_IN
    if isinstance(layer, Embedding):
        return Form.EMBEDDING
    if isinstance(layer, (Conv1d, Conv2d, Conv3d)):
        return Form.CONV
    return Form.TRANSPOSED if isinstance(base, Conv1D) else Form.LINEAR
