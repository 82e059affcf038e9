"""What of a layer's state a recording depends on, and copies of parameters that recordings share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fvlm_core.fused.adapted import Adapted, adapted, why_unfused
from fvlm_core.hooks import hooks_act, hooks_inside


def linear_layers(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers of a block, PEFT's wrappers in the place of what they wrap."""
    return [child for _, _, child in _inside(module) if _is_linear(child)]


def _is_linear(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer | nn.Linear)


def _inside(parent: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield each module in a block with its parent and its name there; what is inside of linear layers is left out."""
    for name, child in parent.named_children():
        yield parent, name, child
        if not _is_linear(child):
            yield from _inside(child)


class LayerState:
    """What of a layer's state a recording depends on beside its shapes; compared before every replay.

    Args:
        module: the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        inside = list(_inside(module))
        self._children = [(parent._modules, name, child) for parent, name, child in inside]
        self._linears = [child for _, _, child in inside if _is_linear(child)]
        self.adapted = [adapted(linear) for linear in self._linears]
        owners = (module, *(child for _, _, child in inside if not _is_linear(child)))
        self._others = [
            (owner._parameters, name, p, p.requires_grad, p.data_ptr())
            for owner in owners
            for name, p in owner.named_parameters(recurse=False)
        ]
        others = {id(p): p for _, _, p, _, _ in self._others}.values()
        biases = [one.layer.bias for one in self.adapted if one is not None and one.layer.bias is not None]
        adapters = [p for one in self.adapted if one is not None for p in (one.layer.a, one.layer.b) if p is not None]
        self.trained = [p for p in (*adapters, *biases, *others) if p.requires_grad]
        own = [(m._parameters, name) for m in module.modules() for name in m._parameters]
        self.places = [(held, name, p) for held, name in own if (p := held[name]) is not None and p.requires_grad]
        """Where modules hold parameters that are trained: their dictionary, the name in it, the parameter."""
        self._hooks = hooks_inside(module)
        self.reason = self._unfit(module)
        """Why it cannot be recorded, or None."""

    def _unfit(self, module: nn.Module) -> str | None:
        for linear, one in zip(self._linears, self.adapted, strict=True):
            if one is None:
                return f"a linear layer {why_unfused(linear)}"
        if hooks_act(self._hooks):
            return "hooks act on it"
        return "it has dropout" if any(m.training and _drops(m) for m in module.modules()) else None

    def holds(self) -> bool:
        """Whether nothing has changed, and no hook acts that a replay would leave out."""
        return (
            not hooks_act(self._hooks)
            and all(one is not None and one.holds() for one in self.adapted)
            and all(owned.get(name) is child for owned, name, child in self._children)
            and all(
                owned.get(name) is p and p.requires_grad is flag and p.data_ptr() == place
                for owned, name, p, flag, place in self._others
            )
        )

    def pairs(self) -> Iterator[tuple[nn.Module, Adapted]]:
        """Yield each linear layer that has an adapter or a trained bias with what it is for the kernels."""
        for linear, one in zip(self._linears, self.adapted, strict=True):
            if one is None:
                continue
            bias = one.layer.bias
            if one.layer.a is not None or (bias is not None and bias.requires_grad):
                yield linear, one


def _drops(module: nn.Module) -> bool:
    """Whether a module drops values in training: by being such a module, or by a probability that it keeps."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    kept = (value for name, value in vars(module).items() if name.endswith("dropout"))
    return any(isinstance(value, float) and value > 0 for value in kept)


class Copies:
    """Parameters in another dtype, at a place that stays; all recordings of a model share them."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the place of a parameter's copy; whoever reads it fills it first."""
        key = (id(parameter), dtype)
        held = self._held.get(key)
        if held is None or held[0] is not parameter or held[1].requires_grad is not parameter.requires_grad:
            copy = torch.empty_like(parameter, dtype=dtype).detach().requires_grad_(parameter.requires_grad)
            held = self._held[key] = parameter, copy
        return held[1]
