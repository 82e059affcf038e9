"""Binding fused forwards to the modules that a family's table names, and taking them off again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.arch import facts_for, plain_modules, task_model
from fvlm_core.bound import in_place_of
from fvlm_core.errors import CheckpointError
from fvlm_core.fused.adapted import forget
from fvlm_core.fused.cache import NAMES
from fvlm_core.fused.kinds import KIND, kind_of
from fvlm_core.fused.table import LAYERS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FusionReport", "fuse_model", "fusion_report", "kind_of", "unfuse_model"]

logger = logging.getLogger(__name__)

_REPORT = "_fvlm_fused"
_CACHES = (*NAMES, "layer_past")
"""A layer that is computed a second time must not write to a cache twice."""


@dataclass(frozen=True)
class FusionReport:
    """What was replaced in a model, and what was left.

    Attributes:
        fused: names of the modules that have a fused forward → the kind of it.
        left: names of modules that the table names but that keep their own → why.
    """

    fused: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line: how many modules of each kind, and the reasons for what was left."""
        if not self.fused and not self.left:
            return "no fused layers: the family has no table of them"
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(self.fused.values()).items()))
        reasons = "; ".join(f"{count} {reason}" for reason, count in Counter(self.left.values()).items())
        return f"fused: {counted or 'nothing'}" + (f"; left as they are: {reasons}" if reasons else "")


def fuse_model(model: nn.Module) -> FusionReport:
    """Give the modules that the model's family lists their fused forwards.

    Call it again after modules were added or exchanged; what is fused already stays.

    Args:
        model: a task model, or PEFT's wrapper around one.

    Returns:
        What was done, which `fusion_report` returns from now on.

    Raises:
        CheckpointError: the family's table names a class that the model does not have.
    """
    table = _table_for(model)
    fused: dict[str, str] = {}
    left: dict[str, str] = {}
    met: set[str] = set()
    for name, module in plain_modules(model):
        kind = table.get(type(module).__name__)
        if kind is None:
            continue
        met.add(type(module).__name__)
        reason = _bind(module, kind)
        if reason is None:
            fused[name] = kind
        else:
            left[name] = reason
    missing = sorted(set(table) - met)
    if missing:
        raise CheckpointError(
            f"The table of fused layers of {facts_for(model).model_type!r} names {missing[0]}, which the model does "
            "not have: pass fused_layers=False to load it without them, and report the version of transformers."
        )
    report = FusionReport(fused, left)
    vars(task_model(model))[_REPORT] = report
    return report


def _table_for(model: nn.Module) -> dict[str, str]:
    """Return the family's table, with that of the text model that it wraps here."""
    facts = facts_for(model)
    text = task_model(model).config.get_text_config().model_type
    return {**facts.fused, **facts.fused_text.get(text, {})}


def unfuse_model(model: nn.Module) -> None:
    """Take all fused forwards off, so that every module is what it was."""
    for module in model.modules():
        if kind_of(module) is not None:
            del vars(module)["forward"]
        forget(module)
    vars(task_model(model)).pop(_REPORT, None)


def fusion_report(model: nn.Module) -> FusionReport:
    """Return what `fuse_model` did to a model; an empty report where nothing was done."""
    report: Any = vars(task_model(model)).get(_REPORT)
    return report if isinstance(report, FusionReport) else FusionReport()


def _bind(module: nn.Module, kind: str) -> str | None:
    """Bind the fused forward of a kind to a module; return why not where it cannot be."""
    if kind_of(module) == kind:
        return None
    if "forward" in vars(module):
        return "has a forward of its own"
    reason = LAYERS[kind].unfit(module)
    if reason is None:
        fused = in_place_of(module, "forward", _run, kind, _checkpoints_in_forward(module))
        setattr(fused, KIND, kind)
    return reason


def _run(module: Any, kind: str, checkpointed: bool, /, *args: Any, **kwargs: Any) -> Any:
    """Run the fused forward of a kind in a module's place; what is bound to the module."""
    forward = LAYERS[kind].forward
    if checkpointed and module.training and module.gradient_checkpointing and torch.is_grad_enabled():
        uncached = {name: value for name, value in kwargs.items() if name not in _CACHES}
        if "use_cache" in uncached:
            uncached["use_cache"] = False
        return module._gradient_checkpointing_func(partial(forward, module, **uncached), *args)
    return forward(module, *args, **kwargs)


def _checkpoints_in_forward(module: nn.Module) -> bool:
    """Tell whether a module's class checkpoints in its forward, which the fused one must then do in its stead.

    transformers does it in a layer's ``__call__`` up to 5.22, and in its ``forward`` after that, there only while
    gradients are computed: without them the layer runs as it is, cache included.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer) and "__call__" not in vars(GradientCheckpointingLayer)
