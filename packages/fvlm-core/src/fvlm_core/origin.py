"""Where a loaded model came from: set when it is loaded, carried by the model, read when it is exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fvlm_core.precision import Precision

if TYPE_CHECKING:
    from torch import nn

_ATTRIBUTE = "fvlm_origin"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model's base weights came from. It never holds a token."""

    source: str  # folder or Hub id of the base checkpoint
    revision: str | None  # the Hub revision asked for; None: the default branch, or a folder
    precision: Precision  # how it was loaded
    source_quantized: bool  # the checkpoint itself holds quantized weights
    dtype: str  # what the unquantized weights are held in: "bfloat16", "float16", "float32"
    trust_remote_code: bool


def set_origin(model: nn.Module, origin: Origin) -> None:
    """Note on ``model`` (a base model, not an adapter around one) where it came from."""
    setattr(model, _ATTRIBUTE, origin)


def origin_of(model: nn.Module) -> Origin | None:
    """Where ``model`` came from, or None where FVLM did not load it; looks through a `peft.PeftModel`."""
    # A PeftModel hands the attributes it lacks on to the model it wraps, so one look finds it at any depth.
    origin = getattr(model, _ATTRIBUTE, None)
    return origin if isinstance(origin, Origin) else None
