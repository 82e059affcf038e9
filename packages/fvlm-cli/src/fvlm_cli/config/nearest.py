"""The name that a misspelt one was meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "did you mean …?", or the list of known names where none is near.

    Args:
        name: what was written.
        known: what could have been.
        prefix: put before each name that the hint gives.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"use one of {', '.join(prefix + item for item in names)}."
