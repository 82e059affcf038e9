"""The cache of keys and values, which transformers calls `cache` since 5.24, and `past_key_values` before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

NAMES = ("cache", "past_key_values")
FIELD = next(name for name in NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
"""What the installed transformers calls it in outputs and in calls of a language model."""


def cache_in(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of a layer's keyword arguments, under either name; None where there is none."""
    found = [kwargs.pop(name, None) for name in NAMES]
    return next((cache for cache in found if cache is not None), None)


def updated(cache: Any, k: Tensor, v: Tensor, layer: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Write a layer's new keys and values to the cache; return all that it holds of the layer.

    Since 5.24 a layer hands over its own keyword arguments as well, which a paged cache reads.
    """
    found: tuple[Tensor, Tensor] = cache.update(k, v, layer, **({"kwargs": kwargs} if FIELD == "cache" else {}))
    return found


def cache_of(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache of a model's output as the keyword argument of another output."""
    return {FIELD: outputs.get(FIELD)}
