"""The trainer's optimizer over flat parameters: a constant number of launches, whatever the number of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.flat import FlatParameters, clip_gradients, flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import Tensor, nn

_ELEMENTWISE = frozenset(
    {"torch.optim.adam.Adam", "torch.optim.adamw.AdamW", "torch.optim.sgd.SGD"}
    | {f"bitsandbytes.optim.adamw.{name}" for name in ("AdamW", "AdamW8bit", "AdamW32bit")}
)
"""Optimizers that work on each element alone, or on blocks of them."""


class FlatOptimizer:
    """An optimizer of the kind that was asked for, whose parameters are flat.

    An optimizer passes over a parameter without a gradient. Since a batch without images gives the vision tower none,
    the parameters of each tower have a flat one of their own.

    Args:
        kind: its class.
        groups: parameter groups as for any optimizer.
        options: its further arguments.
        together: tells for a parameter which others get their gradients together with it.
    """

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        groups: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        together: Callable[[nn.Parameter], Hashable],
    ) -> None:
        self._flat: list[FlatParameters] = []
        own: list[dict[str, Any]] = []
        for group in groups:
            parts: dict[Hashable, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                parts.setdefault(together(parameter), []).append(parameter)
            made = [flatten(part) for part in parts.values()]
            flat = [one for ones, _ in made for one in ones]
            self._flat += flat
            own.append(
                {**group, "params": [*(one.parameter for one in flat), *(p for _, alone in made for p in alone)]}
            )
        self.parameters: list[nn.Parameter] = [p for group in own for p in group["params"]]
        self.optimizer = kind(own, **options)
        self._gathered = False
        self.optimizer.register_step_pre_hook(self._before_step)
        self.optimizer.register_step_post_hook(self._after_step)

    @staticmethod
    def suits(kind: Any, options: Mapping[str, Any]) -> bool:
        """Tell whether an optimizer gives the same values over flat parameters."""
        if not isinstance(kind, type):
            return False
        brings_parameters = {"params", "model", "optimizer_dict"} & set(options)
        return f"{kind.__module__}.{kind.__qualname__}" in _ELEMENTWISE and not brings_parameters

    def behind(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """Return the model's parameters that lie in one of the optimizer's; they all get their gradients together."""
        return next((flat.parameters for flat in self._flat if flat.parameter is parameter), [parameter])

    @property
    def alone(self) -> list[nn.Parameter]:
        """The parameters that lie in no flat one."""
        flat = {id(one.parameter) for one in self._flat}
        return [p for p in self.parameters if id(p) not in flat]

    def hold(self) -> None:
        """Copy the gradients so far to the flat ones."""
        for flat in self._flat:
            flat.gather()

    def put_back(self) -> None:
        """Give parameters that have a gradient the one that they had when it was held."""
        for flat in self._flat:
            flat.scatter()

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients for the next step; return their norm before, a 0-d tensor."""
        for flat in self._flat:
            flat.gather()
        self._gathered = True
        return clip_gradients(self.parameters, max_norm)

    def _before_step(self, *_: Any) -> None:
        if not self._gathered:
            for flat in self._flat:
                flat.gather()
        self._gathered = False

    def _after_step(self, *_: Any) -> None:
        for flat in self._flat:
            flat.release()
