"""Walking a model's modules and parameters once a run instead of several times a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """Let ``model.train()`` and ``model.zero_grad()`` work from lists while the context lasts.

    A trainer calls both in every step, and on a model of thousands of modules each walk holds the device up for longer
    than some layers take. They do what they did before, but for modules and parameters that are added in the meantime.
    Both are set on this instance and taken off at the end.

    Args:
        model: what is trained.
    """
    modules = list(model.modules())
    parameters = list(model.parameters())

    def train(mode: bool = True) -> Any:
        if not all(module.training is mode for module in modules):
            type(model).train(model, mode)
        return model

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            type(model).zero_grad(model, set_to_none=False)
            return
        for parameter in parameters:
            parameter.grad = None

    own = {"train": train, "zero_grad": zero_grad}
    if any(name in vars(model) for name in own):  # somebody else's
        yield
        return
    vars(model).update(own)
    try:
        yield
    finally:
        for name in own:
            vars(model).pop(name, None)
