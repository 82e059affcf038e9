"""Which layers are replayed, which are recorded, and which run as they are."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from inspect import signature
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fvlm_core.fused.blocks import CROSS_ATTENTION_ALONE
from fvlm_core.fused.segments import PACKED_LONGEST, PACKED_STARTS
from fvlm_core.graphs.fit import Fit, Fits, is_text
from fvlm_core.graphs.layer import RecordedLayer, Replay
from fvlm_core.graphs.room import Room
from fvlm_core.graphs.stage import Arena, Key, Stage
from fvlm_core.graphs.state import Copies, LayerState
from fvlm_core.graphs.tape import CudaRecorder, PlainRecorder, Recorder
from fvlm_core.passes import KEEP_FROM

logger = logging.getLogger(__name__)

MOST_STAGES = 64
"""How many shapes of all kinds of layers are kept recorded; the one that was not used for longest goes first."""
_MOST_SEEN = 1024
"""How many shapes that came are counted of a layer before the count starts anew."""
OFTEN = 8
"""How often a shape comes in a longer recording before it may get one of its own."""
_FIRST_GUESS = 1 << 28
"""Bytes that the first layer of a kind is taken to keep, before one is recorded."""
_OF_OTHERS = ("image_", "video_", *CROSS_ATTENTION_ALONE)
"""What the names of arguments start with that transformers hands to every layer, and that text layers do not read."""

_OF_TEXT = (PACKED_STARTS, PACKED_LONGEST)
"""The same for layers that are none of a language model's."""

Saving = Callable[[], AbstractContextManager[Any]]
_Prepared = tuple[RecordedLayer, tuple[Any, ...]]
"""A recorded layer and the keyword arguments of a call."""


class LayerGraphs:
    """Runs checkpointed layers as recordings where that is possible.

    A shape is recorded when it comes for the second time: one that never comes again is not worth it. Shapes that
    differ a little share a recording (`fvlm_core.graphs.fit`).

    Args:
        rehearse: use recordings that run the layers' own code again, on any device; for tests.
        memory_budget: GiB of device memory, for `keep`; see `Room`.
        keep_attention_from: see `fvlm_core.passes.KEEP_FROM`; it acts where what layers keep goes to the host.

    Attributes:
        keep: whether layers keep what their forward passes compute, as far as there is room for it; the others compute
            it again.
    """

    def __init__(
        self, rehearse: bool = False, memory_budget: float | None = None, keep_attention_from: int = KEEP_FROM
    ) -> None:
        self._rehearse, self._keep_from = rehearse, keep_attention_from
        self._room = Room(memory_budget)
        self.keep = False
        self._recorders: dict[torch.device, Recorder] = {}
        self._stages: OrderedDict[Key, _Kind] = OrderedDict()
        self._seen: WeakKeyDictionary[nn.Module, Counter[Key]] = WeakKeyDictionary()
        self._varied: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        """How many recordings of longer shapes than its own a layer got."""
        self._trained: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._copies, self._arena, self._fits = Copies(), Arena(), Fits()
        self._off = False
        self.replayed = self.recorded = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGraphs:
        """A copied model records anew: a recording works on the memory of the one that it was made of."""
        return self._fresh()

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of a recording can be stored."""
        return _made, (self._rehearse, self._room.budget, self._keep_from, self.keep)

    def _fresh(self) -> LayerGraphs:
        return _made(self._rehearse, self._room.budget, self._keep_from, self.keep)

    def run(self, layer: Callable[..., Any], args: tuple[Any, ...], saving: Saving | None = None) -> Tensor | None:
        """Run a layer as a recording; None where it must be run as it is.

        Args:
            layer: the call of a module, its keyword arguments bound.
            args: its positional arguments: the hidden state, and in some vision towers the mask.
            saving: makes the context in which autograd saves what a layer keeps that computes the rest again, such as
                one that moves it to the host; None: it keeps the hidden state alone, where it is.
        """
        found = self._prepared(layer, args, None if saving is None else self._keep_from)
        if found is None:
            return None
        recorded, values = found
        self.replayed += 1
        with nullcontext() if recorded.kept or saving is None else saving():
            out: Tensor = Replay.apply(recorded, values, args[0], *recorded.trained)  # type: ignore[no-untyped-call]
        return out

    def _prepared(self, layer: Callable[..., Any], args: tuple[Any, ...], keep_from: int | None) -> _Prepared | None:
        module = module_of(layer)
        if self._off or module is None or not isinstance(layer, partial) or not args or not self._suits(args[0]):
            return None
        hidden = args[0]
        kwargs = {**dict(zip(_names_behind_the_first(type(module).forward), args[1:], strict=False)), **layer.keywords}
        others = _OF_OTHERS if is_text(module) else _OF_TEXT
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith(others)}
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # The first block of a tower makes the gradient of its input as the others do: one recording serves them all.
        needs_dx = hidden.requires_grad or self._trains(module)
        state = (hidden.dtype, hidden.device, needs_dx, autocast, module.training, keep_from)
        found: list[tuple[Key, Fit]] = []
        for fit in self._fits.of(module, hidden, kwargs, autocast or hidden.dtype):
            if fit.about is None:
                continue
            found.append(((type(module), (*hidden.shape[:-2], fit.tokens, hidden.shape[-1]), *state, fit.about), fit))
            recorded = self._recorded(module, found[-1][0])
            if recorded is not None and (len(found) == 1 or not self._outgrown(module, found[0][0], found[1][0])):
                return recorded, tuple(fit.kwargs.values())
        chosen = self._worth_recording(module, found)
        return None if chosen is None else self._new(module, layer, hidden, *chosen, autocast, keep_from, needs_dx)

    def _recorded(self, module: nn.Module, key: Key) -> RecordedLayer | None:
        kind = self._stages.get(key)
        if kind is None:
            return None
        self._stages.move_to_end(key)
        recorded = kind.layers.get(module)
        return recorded if recorded is not None and recorded.state.holds() else None

    def _counted(self, module: nn.Module, *keys: Key) -> Counter[Key]:
        """Count a call of a layer by what it fits; return the layer's counts."""
        seen = self._seen.setdefault(module, Counter())
        if len(seen) > _MOST_SEEN:  # shapes that never repeat
            seen.clear()
        seen.update(keys)
        return seen

    def _outgrown(self, module: nn.Module, close: Key, wide: Key) -> bool:
        """Count a call that runs in a longer recording; tell whether its own shape has come to be most of those."""
        seen = self._counted(module, close, wide)
        return seen[close] > OFTEN and 2 * seen[close] > seen[wide]

    def _worth_recording(self, module: nn.Module, found: list[tuple[Key, Fit]]) -> tuple[Key, Fit] | None:
        """Count a call; return which of the recordings that it fits is to be made now, or None for none.

        A shape is recorded when it comes for the second time; a close one, rather than the longer one that others fit
        as well, if most of those that fit the longer one are of it. A layer that has come to need longer ones gets the
        next of them at first sight.
        """
        seen = self._counted(module, *(key for key, _ in found))
        if not found:
            return None
        (close, fit), (wide, other) = found[0], found[-1]
        if seen[close] > 1 and 2 * seen[close] > seen[wide]:
            return close, fit
        if seen[wide] > 1 or (wide != close and self._varied.get(module, 0) > 1):
            self._varied[module] = self._varied.get(module, 0) + (wide != close)
            return wide, other
        return None

    def _trains(self, module: nn.Module) -> bool:
        """Whether a layer had trained parameters when it was first met; a wrong answer costs time, never a gradient."""
        if module not in self._trained:
            self._trained[module] = any(p.requires_grad for p in module.parameters())
        return self._trained[module]

    def _new(
        self,
        module: nn.Module,
        layer: partial[Any],
        hidden: Tensor,
        key: Key,
        fit: Fit,
        autocast: torch.dtype | None,
        keep_from: int | None,
        needs_dx: bool,
    ) -> _Prepared | None:
        """Record a layer; None where it cannot be."""
        kind = self._stages.get(key)
        if kind is not None and kind.unfit:
            return None
        state = LayerState(module)
        if not state.recordable:
            return None
        if kind is None:
            kind = self._new_kind(key, Stage(hidden, fit.kwargs, fit.tokens, needs_dx, self._arena))
        recorder = self._recorder_for(hidden.device)
        call = partial(layer.func, *layer.args)
        recorded = RecordedLayer(state, kind.stage, call, recorder, autocast, self._copies, keep_from)
        kind.stage.load_arguments(tuple(fit.kwargs.values()))
        if not kind.layers and not recorded.warm_up():
            kind.unfit = True
            return None
        if not self._record(recorded, kind, module):
            return None
        kind.layers[module] = recorded
        return recorded, tuple(fit.kwargs.values())

    def _record(self, recorded: RecordedLayer, kind: _Kind, module: nn.Module) -> bool:
        device = recorded.stage.x.device
        keep = self.keep and self._room.has_for(kind.kept_bytes or _FIRST_GUESS, device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        try:
            recorded.record(keep)
        except RuntimeError as error:
            self._off = True
            logger.warning(
                "%s cannot be recorded as a CUDA graph (%s): all layers run as they are.",
                type(module).__name__,
                str(error).splitlines()[0],
            )
            return False
        if recorded.kept:
            size = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else 1 << 20
            kind.kept_bytes = max(size, 1)
            self._room.kept_bytes += kind.kept_bytes
        elif self.keep and kind.kept_bytes and not kind.told:
            kind.told = True
            logger.info("No room for more than %d kept layers of %s: the others compute again in the backward pass.",
                        len(kind.layers), type(module).__name__)  # fmt: skip
        self.recorded += 1
        return True

    def _suits(self, hidden: Any) -> bool:
        return (
            isinstance(hidden, Tensor)
            and hidden.dim() >= 2
            and hidden.numel() > 0
            and (hidden.is_cuda or self._rehearse)
            and not torch.compiler.is_compiling()
        )

    def _new_kind(self, key: Key, stage: Stage) -> _Kind:
        while len(self._stages) >= MOST_STAGES:
            old, dropped = self._stages.popitem(last=False)
            for seen in self._seen.values():
                seen.pop(old, None)  # it must come twice again
            self._room.kept_bytes -= dropped.kept_bytes * sum(layer.kept for layer in dropped.layers.values())
        kind = self._stages[key] = _Kind(stage)
        logger.info("Recording %s for hidden states of shape %s.", key[0].__name__, tuple(key[1]))
        return kind

    def _recorder_for(self, device: torch.device) -> Recorder:
        if device not in self._recorders:
            self._recorders[device] = PlainRecorder() if self._rehearse else CudaRecorder(device)
        return self._recorders[device]


def _made(rehearse: bool, memory_budget: float | None, keep_attention_from: int, keep: bool) -> LayerGraphs:
    graphs = LayerGraphs(rehearse, memory_budget, keep_attention_from)
    graphs.keep = keep
    return graphs


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


class _Kind:
    """The layers that are recorded for one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.layers: dict[nn.Module, RecordedLayer] = {}
        self.unfit = self.told = False
        self.kept_bytes = 0


@cache
def _names_behind_the_first(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a layer's arguments behind the hidden state."""
    return tuple(signature(forward).parameters)[2:]
