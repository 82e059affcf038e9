"""What the call of a checkpointed layer says: whose it is, and what its arguments are named."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from types import MethodType
from typing import Any

from torch import nn

from fvlm_core.fused.blocks import CROSS_ATTENTION_ALONE
from fvlm_core.fused.segments import PACKED_LONGEST, PACKED_STARTS
from fvlm_core.graphs.fit import is_text

_OF_OTHERS = ("image_", "video_", *CROSS_ATTENTION_ALONE)
"""What the names of arguments start with that transformers hands to every layer, and that text layers do not read."""
_OF_TEXT = (PACKED_STARTS, PACKED_LONGEST)
"""The same for layers that are none of a language model's."""


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


def arguments_of(module: nn.Module, layer: partial[Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Return by name what a layer is called with behind its hidden state, without what layers like it do not read."""
    kwargs = {**dict(zip(_names_behind_the_first(type(module).forward), args[1:], strict=False)), **layer.keywords}
    others = _OF_OTHERS if is_text(module) else _OF_TEXT
    return {name: value for name, value in kwargs.items() if not name.startswith(others)}


@cache
def _names_behind_the_first(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a layer's arguments behind the hidden state."""
    return tuple(signature(forward).parameters)[2:]
