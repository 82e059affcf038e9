"""What of a model a recorded step depends on: its modules, their hooks, places of parameters, the active adapter."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from fvlm_core.fused.adapted import adapted, why_unfused
from fvlm_core.graphs.state import linear_layers
from fvlm_core.hooks import forward_hooks, hooks_act


def _modules(language: nn.Module) -> list[nn.Module]:
    """Return a language model's modules; of linear layers, what PEFT put around them and not what is inside."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        found.append(module)
        if not isinstance(module, BaseTunerLayer | nn.Linear):
            for child in module.children():
                visit(child)

    visit(language)
    return found


def _is_hooked(module: nn.Module) -> bool:
    """Tell whether a module's call does more than its forward."""
    return hooks_act(forward_hooks(module))


def _is_trained_itself(linear: nn.Module) -> bool:
    """Tell whether it is a plain linear layer in full fine-tuning: it is recorded as it is, and changes in place."""
    return type(linear) is nn.Linear and linear.weight.requires_grad and "forward" not in vars(linear)


class ModelState:
    """The state that a model is in; compared before every call.

    Args:
        model: the task model.
        language: its language model.
    """

    def __init__(self, model: Any, language: nn.Module) -> None:
        self._model, self._language = model, language
        self._head = model.get_output_embeddings()
        self._found = _modules(language)
        linears = linear_layers(language)
        self._adapted = [adapted(linear) for linear in linears]
        self._unfused = [linear for linear, one in zip(linears, self._adapted, strict=True) if one is None]
        self._places = self._parameters(self._found)
        self._on_one_device = len({parameter.device for parameter in model.parameters()}) == 1

    def holds(self) -> bool:
        """Whether nothing has changed; values that change in place are no change."""
        found = _modules(self._language)
        return (
            self._model.get_output_embeddings() is self._head
            and len(found) == len(self._found)
            and all(a is b for a, b in zip(found, self._found, strict=True))
            and not any(_is_hooked(module) for module in found)
            and all(one is None or one.holds() for one in self._adapted)
            and all(_is_trained_itself(linear) for linear in self._unfused)
            and self._parameters(found) == self._places
        )

    def _parameters(self, modules: list[nn.Module]) -> list[tuple[int, int]]:
        """Return which parameters modules have themselves, and where these lie; adapters' are further inside."""
        seen = (*modules, *(() if self._head is None else (self._head,)))
        return [(id(p), p.data_ptr()) for module in seen for p in module._parameters.values() if p is not None]

    def unfit(self) -> str | None:
        """Say why a model is not recorded in this state, or None."""
        if self._model.training:
            return "the model is in training mode"
        if not self._on_one_device:
            return "the model lies on several devices"
        if type(self._head) is not nn.Linear or _is_hooked(self._head):
            return "the head is adapted or hooked, or there is none"
        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in self._found):
            return "whole modules of the language model are trained beside the adapter"
        if any(_is_hooked(module) for module in self._found):
            return "the language model has hooks"
        linear = next((one for one in self._unfused if not _is_trained_itself(one)), None)
        return None if linear is None else f"a linear layer {why_unfused(linear)}"
