"""Walking a model's modules as they were before PEFT wrapped some of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def task_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a `PeftModel`, or the model itself."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model = model.get_base_model()
    return model  # type: ignore[return-value]  # what is not a PeftModel is a transformers model by contract


def unwrap(module: nn.Module | None) -> nn.Module | None:
    """Return what PEFT put a layer or a trained copy around; any other module, or None, as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(name, module)`` as ``named_modules`` of the model without adapters would.

    A layer that PEFT wrapped is shown as its base layer under its own name; LoRA matrices and trained copies of whole
    modules (``modules_to_save``) are not shown. A module that occurs twice is shown once.
    """
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        inner = unwrap(module)
        if inner is None or id(inner) in seen:
            return
        module = inner
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", task_model(model))


def is_under(name: str, path: str) -> bool:
    """Tell whether a module's name is a path or lies below it."""
    return name == path or name.startswith(f"{path}.")


def ends_in(name: str, suffix: str) -> bool:
    """Tell whether a module's name ends in some whole components."""
    return name == suffix or name.endswith(f".{suffix}")
