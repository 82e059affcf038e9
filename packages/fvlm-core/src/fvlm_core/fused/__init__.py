"""Fused layers in the place of a loaded model's own: found by the family's table, counted, reported, undone.

A replacement is a ``forward`` bound to one module *instance*: its parameters, submodules, name and class stay what they
are, so that PEFT, `state_dict`, hooks and `isinstance` see the module that was there, and removing the attribute brings
the class's own forward back. What a fused layer reads (the adapter that is active, whether it is merged or disabled) it
reads at every call; where a state has no fused form the layer calls its submodules one by one, as stock does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fvlm_core.fused.engine import FusionReport, fuse_model, fusion_report, unfuse_model

__all__ = [
    "CAUSAL_LAYER",
    "LEARNED_TOKENS",
    "FusionReport",
    "fuse_model",
    "fusion_report",
    "has_fused",
    "has_fused_loss",
    "unfuse_model",
]

CAUSAL_LAYER = "decoder_layer"
"""The kind of the text layers whose tokens see none that come after them: trailing padding changes nothing for them."""

LEARNED_TOKENS = "learned_tokens"
"""Key of a fused model's training output: how many learned tokens it said right, and how many there are."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fvlm_core.fused import engine

    return getattr(engine, name)


def has_fused(model: nn.Module, kind: str) -> bool:
    """Tell whether a model has a fused layer of a kind (`fvlm_core.fused.table`)."""
    from fvlm_core.fused.engine import fusion_report

    return kind in fusion_report(model).fused.values()


def has_fused_loss(model: nn.Module) -> bool:
    """Tell whether a model's training loss takes ``label_rows`` (`fvlm_core.fused.head`)."""
    return has_fused(model, "task_model") or has_fused(model, "gemma_task_model")
