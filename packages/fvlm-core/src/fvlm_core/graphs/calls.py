"""What the call of a checkpointed layer says: whose it is, and what its arguments are named."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from types import MethodType
from typing import Any

from torch import nn


def module_of(layer: Callable[..., Any]) -> nn.Module | None:
    """Return the module whose call or forward is about to be checkpointed, or None.

    Args:
        layer: what transformers hands to a checkpointing function: the keyword arguments bound to a module's method,
            or to a function and the module.
    """
    if isinstance(layer, partial):
        first = layer.args[0] if layer.args else None
        return first if isinstance(first, nn.Module) else module_of(layer.func)
    owner = layer.__self__ if isinstance(layer, MethodType) else layer
    return owner if isinstance(owner, nn.Module) else None


@cache
def names_behind_the_first(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a layer's arguments behind the hidden state."""
    return tuple(signature(forward).parameters)[2:]
