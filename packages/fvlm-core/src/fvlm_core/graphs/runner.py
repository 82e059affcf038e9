"""Which layers are replayed, which are recorded, and which run as they are."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fvlm_core.graphs.calls import arguments_of, module_of
from fvlm_core.graphs.fit import Fit, Fits
from fvlm_core.graphs.kind import Kind
from fvlm_core.graphs.layer import RecordedLayer, Replay
from fvlm_core.graphs.room import Room
from fvlm_core.graphs.sightings import Sightings
from fvlm_core.graphs.stage import Arena, Key, Stage
from fvlm_core.graphs.state import Copies, LayerState
from fvlm_core.graphs.tape import CudaRecorder, PlainRecorder, Recorder
from fvlm_core.graphs.unrecorded import Unrecorded
from fvlm_core.passes import KEEP_FROM
from fvlm_core.repeat import once_more

logger = logging.getLogger(__name__)

MOST_STAGES = 64
"""How many shapes of all kinds of layers are kept recorded; the one that was not used for longest goes first."""
Saving = Callable[[], AbstractContextManager[Any]]
_Prepared = tuple[RecordedLayer, tuple[Any, ...]]
"""A recorded layer and the keyword arguments of a call."""


class LayerGraphs:
    """Runs checkpointed layers as recordings where that is possible.

    A shape is recorded when it comes for the second time: one that never comes again is not worth it. Shapes that
    differ a little share a recording (`fvlm_core.graphs.fit`).

    Args:
        rehearse: use recordings that run the layers' own code again, on any device; for tests.
        memory_budget: GiB of device memory, for what layers `keep`; see `Room`.
        keep_attention_from: see `fvlm_core.passes.KEEP_FROM`; it acts where what layers keep goes to the host.

    Attributes:
        unrecorded: decides what layers keep that cannot be recorded.
    """

    def __init__(
        self, rehearse: bool = False, memory_budget: float | None = None, keep_attention_from: int = KEEP_FROM
    ) -> None:
        self._rehearse, self._keep_from, self.memory_budget = rehearse, keep_attention_from, memory_budget
        self._room, self.unrecorded = Room(memory_budget), Unrecorded(memory_budget, rehearse)
        self._recorders: dict[torch.device, Recorder] = {}
        self._stages: OrderedDict[Key, Kind] = OrderedDict()
        self._sightings = Sightings()
        self._trained: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._copies, self._arena, self._fits = Copies(), Arena(), Fits()
        self._too_large: dict[type[nn.Module], int] = {}
        """The smallest hidden state, in numbers, for which there was no memory to record a kind of layers."""
        self._off = self._keep = False
        self.replayed = self.recorded = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or stored model records anew: a recording works on the memory of the one that it was made of."""
        return LayerGraphs, (self._rehearse, self.memory_budget, self._keep_from), {"_keep": self.keep}

    @property
    def keep(self) -> bool:
        """Whether layers keep what they compute, as far as there is room; where it changes, all are recorded anew."""
        return self._keep

    @keep.setter
    def keep(self, wanted: bool) -> None:
        if wanted != self._keep:
            self._drop_recordings()
            self._keep, self._room.kept_bytes = wanted, 0

    def run(self, layer: Callable[..., Any], args: tuple[Any, ...], saving: Saving | None = None) -> Tensor | None:
        """Run a layer as a recording; None where it must be run as it is.

        Args:
            layer: the call of a module, its keyword arguments bound.
            args: its positional arguments: the hidden state, and in some vision towers the mask.
            saving: makes the context in which autograd saves what a layer keeps that computes the rest again, such as
                one that moves it to the host; None: it keeps the hidden state alone, where it is.
        """
        try:
            return once_more(lambda: self._replayed(layer, args, saving), self.give_back)
        except torch.OutOfMemoryError:
            return None  # a recording takes more than the layer as it is, which says it if that is too much as well

    def _replayed(self, layer: Callable[..., Any], args: tuple[Any, ...], saving: Saving | None) -> Tensor | None:
        found = self._prepared(layer, args, None if saving is None else self._keep_from)
        if found is None:
            self._make_room(layer, args)
            return None
        recorded, values = found
        self.replayed += 1
        with nullcontext() if recorded.kept or saving is None else saving():
            out: Tensor = Replay.apply(  # type: ignore[no-untyped-call]
                recorded, values, self.give_back, args[0], *recorded.trained
            )
        return out

    def _make_room(self, layer: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Give memory back before a layer runs as it is that takes more than is free, by what such layers keep."""
        module, hidden = module_of(layer), args[0] if args else None
        if not self.holds or module is None or not isinstance(hidden, Tensor):
            return
        rates = [kind.kept_bytes / prod(key[1]) for key, kind in self._stages.items() if key[0] is type(module)]
        if any(rates) and not self._room.allows(max(rates) * hidden.numel(), hidden.device):
            self.give_back()

    @property
    def holds(self) -> bool:
        """Whether layers hold memory between their passes that `give_back` would free."""
        return self._room.kept_bytes > 0

    @property
    def may_hold(self) -> bool:
        """Whether layers hold such memory now, or may come to; those that are not recorded included."""
        return self.holds or (self.keep and (self._room.most > 0 or self.unrecorded.may_hold))

    def keep_less(self) -> bool:
        """Do what `give_back` does, or keep less in layers that are not recorded, for a pass that is done again."""
        return self.give_back() or self.unrecorded.lower()

    def give_back(self) -> bool:
        """Free what layers keep, since memory runs short, and let them keep less from now on.

        It may be called at any time, also between the two passes of a layer: backward passes that are still due compute
        again what is gone. All recordings go, because they share memory; they are made anew when their shapes come.

        Returns:
            Whether there was anything to give back.
        """
        if not self.holds:
            return False
        self._drop_recordings()
        before = self._room.kept_bytes
        self._room.lower()
        logger.warning(
            "Memory ran short while layers kept %.2f GiB for their backward passes: they give it back, compute again "
            "instead, and keep at most %.2f GiB from now on.",
            before / 2**30,
            self._room.most / 2**30,
        )
        return True

    def _drop_recordings(self, stages: bool = False) -> None:
        """Free all recordings; backward passes that are still due compute again what is gone.

        Args:
            stages: free what they work on as well, but for what those passes need.
        """
        for recorder in self._recorders.values():
            recorder.forget()
        for kind in self._stages.values():
            kind.release()
        if stages:
            self._stages.clear()
            self._copies, self._arena = Copies(), Arena()
        if any(device.type == "cuda" for device in self._recorders):
            torch.cuda.empty_cache()  # what records finds no memory that is cached elsewhere

    def _prepared(self, layer: Callable[..., Any], args: tuple[Any, ...], keep_from: int | None) -> _Prepared | None:
        module = module_of(layer)
        if self._off or module is None or not isinstance(layer, partial) or not args or not self._suits(args[0]):
            return None
        hidden = args[0]
        kwargs = arguments_of(module, layer, args)
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
            if recorded is not None and (len(found) == 1 or not self._sightings.outgrown(module, found)):
                return recorded, tuple(fit.kwargs.values())
        chosen = self._sightings.worth_recording(module, found)
        return None if chosen is None else self._new(module, layer, hidden, *chosen, autocast, keep_from, needs_dx)

    def _recorded(self, module: nn.Module, key: Key) -> RecordedLayer | None:
        kind = self._stages.get(key)
        if kind is None:
            return None
        self._stages.move_to_end(key)
        recorded = kind.layers.get(module)
        return recorded if recorded is not None and recorded.state.holds() else None

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
        if (kind is not None and kind.unfit) or prod(key[1]) >= self._too_large.get(type(module), float("inf")):
            return None
        state = LayerState(module)
        self.unrecorded.note(module, state.reason)
        if state.reason is not None:
            return None
        try:
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
        except torch.OutOfMemoryError:
            if not self.holds:  # else it is tried again without what is held
                self._leave_unrecorded(key)
            raise
        return recorded, tuple(fit.kwargs.values())

    def _leave_unrecorded(self, key: Key) -> None:
        """Note that there is no memory to record a shape: neither it nor any larger one of such layers is tried again.

        What is recorded is freed, for the layer itself may need that memory; smaller shapes are recorded anew.
        """
        self._too_large[key[0]] = prod(key[1])
        self._drop_recordings(stages=True)
        logger.warning(
            "No memory to record %s for hidden states of shape %s: such layers, and larger ones, run as they are.",
            key[0].__name__,
            tuple(key[1]),
        )

    def _record(self, recorded: RecordedLayer, kind: Kind, module: nn.Module) -> bool:
        try:
            kind.record(recorded, module, self.keep, self._room)
        except torch.OutOfMemoryError:
            recorded.release()
            raise
        except RuntimeError as error:
            self._off = True
            recorded.release()
            self._drop_recordings(stages=True)  # nothing replays them any more
            self._room.kept_bytes = 0
            logger.warning(
                "%s cannot be recorded as a CUDA graph (%s): all layers run as they are.",
                type(module).__name__,
                str(error).splitlines()[0],
            )
            return False
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

    def _new_kind(self, key: Key, stage: Stage) -> Kind:
        while len(self._stages) >= MOST_STAGES:
            old, dropped = self._stages.popitem(last=False)
            self._sightings.forget(old)  # it must come twice again
            dropped.drop(self._room)
        kind = self._stages[key] = Kind(stage)
        logger.info("Recording %s for hidden states of shape %s.", key[0].__name__, tuple(key[1]))
        return kind

    def _recorder_for(self, device: torch.device) -> Recorder:
        if device not in self._recorders:
            self._recorders[device] = PlainRecorder() if self._rehearse else CudaRecorder(device)
        return self._recorders[device]
