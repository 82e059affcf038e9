"""Which families have a tiny checkpoint, and the module that builds each: an explicit lookup, one line a family."""

from __future__ import annotations

BUILDERS: dict[str, str] = {
    "qwen2_vl": "fvlm_core.testing.qwen",
}
"""Family → the module whose function of the same name returns its blueprint."""

FAMILIES: tuple[str, ...] = tuple(BUILDERS)
