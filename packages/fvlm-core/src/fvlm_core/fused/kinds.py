"""What a module's fused forward is: read off the module itself, by every part that cares."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

KIND = "fvlm_kind"
"""Name of the attribute of a fused forward that holds its kind."""


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of the fused forward that a module has, or None."""
    own = vars(module).get("forward")
    kind: str | None = getattr(own, KIND, None)
    return kind
