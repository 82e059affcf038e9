"""Whether a cache is the fixed one of a recorded decoding step: what attention layers ask at every call."""

from __future__ import annotations

from typing import Any

STEPPING = "fvlm_stepping"
"""Name of the attribute of a cache that says that one token a row is being decoded into fixed memory."""


def is_stepping(cache: Any) -> bool:
    """Tell whether the cache attends itself, to as much of its memory as is filled."""
    return cache is not None and vars(cache).get(STEPPING) is True
