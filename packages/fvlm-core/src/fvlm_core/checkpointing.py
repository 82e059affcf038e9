"""Gradient checkpointing: keep only what goes into each layer, and compute the rest again in the backward pass.

| mode | what a layer keeps for backward | where |
|---|---|---|
| ``False`` | everything it computed | device |
| ``True`` | what went into it | device |
| ``"offload"``, ``"unsloth"`` | what went into it, and what long attention gave | pinned host memory |
| ``"auto"`` | everything, as far as there is room; the other layers as with ``"offload"`` | device |

The result of attention over thousands of tokens is kept where layers run as CUDA graphs (`fvlm_core.passes`).
``"auto"`` is for models that lie on one GPU as a whole. Where layers run as CUDA graphs (`fvlm_core.graphs`) it is
known before a step what each of them keeps; others (8 bit, trained whole, with DoRA or dropout) keep it or not call by
call, by what is free then. Elsewhere it is ``"offload"``, and says so.

A layer through which no gradient flows keeps nothing in any mode, and is not computed again: a frozen vision tower
costs its forward pass only. Recomputation is non-reentrant, so a frozen embedding in front of trainable layers needs no
``enable_input_require_grads``.
"""

from __future__ import annotations

import logging
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from fvlm_core.bound import bind
from fvlm_core.errors import ConfigError
from fvlm_core.graphs import LayerGraphs, module_of
from fvlm_core.offload import Offloader
from fvlm_core.repeat import RandomState, once_more

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_CHOSEN = "_fvlm_checkpointing"
_GRAPHS = "_fvlm_graphs"
_ALIASES: dict[bool | str, bool | str] = {
    False: False,
    True: True,
    "offload": "offload",
    "unsloth": "offload",
    "auto": "auto",
}


class Recompute:
    """What transformers' layers call in place of `torch.utils.checkpoint.checkpoint`.

    Args:
        offload: whether the layer's input waits in pinned host memory for the backward pass.
        graphs: runs layers as CUDA graphs where it can; None: they always run as they are.
    """

    def __init__(self, offload: bool, graphs: LayerGraphs | None = None) -> None:
        self.offload, self.graphs, self._offloader = offload, graphs, Offloader()

    @property
    def mode(self) -> bool | str:
        """The mode that it carries out: True, ``"offload"`` or ``"auto"``."""
        if self.graphs is not None and self.graphs.keep:
            return "auto"
        return "offload" if self.offload else True

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        """Run ``layer(*args)``; in the backward pass, run it again."""
        if not torch.is_grad_enabled():
            return layer(*args)
        if self.graphs is not None:
            out = self.graphs.run(layer, args, self._offloader.every if self.offload else None)
            if out is not None:
                return out
            if self.graphs.keep and _carries_gradient(layer, args):
                out = self.graphs.unrecorded.run(module_of(layer), layer, args)
                if out is not None:
                    return out
            if self.graphs.holds:
                start = RandomState({a.device for a in args if isinstance(a, torch.Tensor)})
                graphs = self.graphs
                return once_more(lambda: self._unrecorded(layer, args), lambda: graphs.give_back() and start.restore())
        return self._unrecorded(layer, args)

    def _unrecorded(self, layer: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if not _carries_gradient(layer, args):
            return layer(*args)
        if self.offload and args and isinstance(args[0], torch.Tensor):
            # The first positional argument is the hidden state. What else comes along (masks, rotary tables) is shared
            # by all layers, and lives on the device anyway.
            with self._offloader.one(args[0]):
                return checkpoint(layer, *args, use_reentrant=False)
        return checkpoint(layer, *args, use_reentrant=False)


def _carries_gradient(layer: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether an input or a parameter of the layer wants a gradient. A wrong no costs memory, never correctness."""
    keywords = (
        tuple(layer.keywords.values()) if isinstance(layer, partial) else ()
    )  # GradientCheckpointingLayer binds them
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *keywords)):
        return True
    module = module_of(layer)
    return module is None or any(p.requires_grad for p in module.parameters())


def canonical_mode(mode: bool | str, memory_budget: float | None = None) -> bool | str:
    """False, True, ``"offload"`` or ``"auto"`` for a mode as the user writes it.

    Args:
        mode: what the user writes.
        memory_budget: what the model was loaded with, or is to be.

    Raises:
        ConfigError: it is none of the modes, or a budget is given that has no say in it.
    """
    if not isinstance(mode, bool | str) or mode not in _ALIASES:
        raise ConfigError(
            f"use_gradient_checkpointing={mode!r} is not a mode: pass False, True, 'offload' "
            "('unsloth' is the same) or 'auto'."
        )
    if memory_budget is not None and _ALIASES[mode] != "auto":
        raise ConfigError(
            f"memory_budget={memory_budget!r} is for what layers keep, and under use_gradient_checkpointing="
            f"{mode!r} nothing is chosen by it: pass 'auto', or load the model without it."
        )
    return _ALIASES[mode]


def apply_checkpointing(model: nn.Module, mode: bool | str) -> bool | str:
    """Choose a model's checkpointing mode, and keep to it.

    The choice is the model's: while it stands, ``model.gradient_checkpointing_enable()`` (which a Trainer calls by its
    own settings) restores this mode, and ``model.enable_input_require_grads()`` does nothing, since it would make a
    frozen tower keep activations. Both are set on this instance only; `remove_checkpointing` takes them off.

    Args:
        model: a transformers model, or a `peft.PeftModel` around one.
        mode: False, True, ``"offload"`` (``"unsloth"``) or ``"auto"``; see the module's table.

    Returns:
        What was applied: False, True, ``"offload"`` or ``"auto"``. It is False, with a warning, for a model whose class
        does not support checkpointing.

    Raises:
        ConfigError: ``mode`` is none of the modes, or a budget that the model was loaded with has no say in it.
    """
    base = _base_model(model)
    graphs = graphs_of(base)
    chosen = canonical_mode(mode, budget_of(base))
    if chosen == "auto" and graphs is None:
        logger.info(
            "use_gradient_checkpointing='auto' is 'offload' here: the model does not lie on one GPU with fused layers."
        )
        chosen = "offload"
    if chosen is not False and not _supports(base):
        logger.warning("%s does not support gradient checkpointing: it stays off.", type(base).__name__)
        chosen = False
    vars(base)[_CHOSEN] = chosen
    base.disable_input_require_grads()  # what PEFT or a Trainer set before
    _switch(base, chosen)
    bind(base, gradient_checkpointing_enable)
    bind(base, enable_input_require_grads)
    return chosen


def use_graphs(model: nn.Module, graphs: LayerGraphs | None) -> None:
    """Let a model's checkpointed layers run as CUDA graphs, or, with None, no longer.

    Args:
        model: a transformers model with fused layers, or a `peft.PeftModel` around one.
        graphs: makes and keeps the recordings.
    """
    base = _base_model(model)
    vars(base)[_GRAPHS] = graphs
    resume_checkpointing(model)


def graphs_of(model: nn.Module) -> LayerGraphs | None:
    """Return what runs a model's checkpointed layers as CUDA graphs, or None."""
    found: Any = vars(_base_model(model)).get(_GRAPHS)
    return found if isinstance(found, LayerGraphs) else None


def budget_of(model: nn.Module) -> float | None:
    """Return the memory budget in GiB that a model was loaded with, or None."""
    graphs = graphs_of(model)
    return None if graphs is None else graphs.memory_budget


def remove_checkpointing(model: nn.Module) -> None:
    """Turn checkpointing off, and give the model its own ``gradient_checkpointing_enable`` back."""
    base = _base_model(model)
    _switch(base, False)
    base.disable_input_require_grads()
    for name in (_CHOSEN, "gradient_checkpointing_enable", "enable_input_require_grads"):
        vars(base).pop(name, None)


def suspend_checkpointing(model: nn.Module) -> None:
    """Turn checkpointing off for a while, as for inference; `resume_checkpointing` restores the choice."""
    _switch(_base_model(model), False)


def resume_checkpointing(model: nn.Module) -> None:
    """Restore the mode that `apply_checkpointing` chose; a model that was given none is left as it is."""
    base = _base_model(model)
    if _CHOSEN in vars(base):
        _switch(base, vars(base)[_CHOSEN])


def checkpointing_mode(model: nn.Module) -> bool | str:
    """What the model does now: False, True (by FVLM or by transformers' own function) or ``"offload"``."""
    for module in _base_model(model).modules():
        if vars(module).get("gradient_checkpointing", False):
            function = vars(module).get("_gradient_checkpointing_func")
            return function.mode if isinstance(function, Recompute) else True
    return False


def _base_model(model: nn.Module) -> PreTrainedModel:
    from peft import PeftModel

    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def _supports(base: PreTrainedModel) -> bool:
    # Model code from the Hub may still use the format of transformers 4.34, which takes no function.
    takes_function = "gradient_checkpointing_func" in signature(base._set_gradient_checkpointing).parameters
    return base.supports_gradient_checkpointing and takes_function


def _switch(base: PreTrainedModel, mode: bool | str) -> None:
    if mode is not False:
        graphs = graphs_of(base)
        if graphs is not None:
            graphs.keep = mode == "auto"
        function = Recompute(offload=mode in ("offload", "auto"), graphs=graphs)
        base._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    elif _supports(base):  # not by the public method, which has another name since transformers 5.23
        base._set_gradient_checkpointing(enable=False)
    elif base.supports_gradient_checkpointing:
        base.gradient_checkpointing_disable()


# The two methods that `apply_checkpointing` sets on the instance, under their names.


def gradient_checkpointing_enable(
    model: PreTrainedModel, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
) -> None:
    """Restore the mode that the model was given; other settings do not change it, and the log says so."""
    mode = vars(model)[_CHOSEN]
    _switch(model, mode)
    wanted = {**(gradient_checkpointing_kwargs or {}), **options}
    if mode is False or wanted.get("use_reentrant") or wanted.get("offload") or wanted.get("every_n_layers", 1) != 1:
        logger.info(
            "Gradient checkpointing stays as use_gradient_checkpointing=%r chose it (asked for: %s).",
            mode,
            wanted or "on",
        )


def enable_input_require_grads(model: PreTrainedModel) -> None:
    """Do nothing: recomputation is non-reentrant, and input gradients would cost a frozen tower its activations."""
    logger.debug("enable_input_require_grads of %s is not needed and not done.", type(model).__name__)
