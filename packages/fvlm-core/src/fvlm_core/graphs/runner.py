"""Which layers are replayed, which are recorded, and which run as they are."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fvlm_core.graphs.layer import Copies, LayerState, RecordedLayer, Replay
from fvlm_core.graphs.stage import Key, Stage, can_round_up, describe
from fvlm_core.graphs.tape import CudaRecorder, PlainRecorder, Recorder

logger = logging.getLogger(__name__)

MOST_STAGES = 16
"""How many shapes of all kinds of layers are kept recorded; the one that was not used for longest goes first."""
ROUND_TO = 64
"""Lengths are rounded up to a multiple of this."""
_FUSED_CAUSAL = "decoder_layer"
_OF_MEDIA = ("image_", "video_")
"""What the names of arguments start with that the vision tower reads, and that transformers hands to every layer."""

_Prepared = tuple[RecordedLayer, tuple[Any, ...]]
"""A recorded layer and the keyword arguments of a call."""


class LayerGraphs:
    """Runs checkpointed layers as recordings where that is possible.

    A shape is recorded when it comes for the second time: one that never comes again is not worth it.

    Args:
        rehearse: use recordings that run the layers' own code again, on any device; for tests.
    """

    def __init__(self, rehearse: bool = False) -> None:
        self._rehearse = rehearse
        self._recorder: Recorder | None = None
        self._stages: OrderedDict[Key, _Kind] = OrderedDict()
        self._seen: WeakKeyDictionary[nn.Module, set[Key]] = WeakKeyDictionary()
        self._copies = Copies()
        self._off = False
        self.replayed = self.recorded = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGraphs:
        """A copied model records anew: a recording works on the memory of the one that it was made of."""
        return LayerGraphs(self._rehearse)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of a recording can be stored."""
        return LayerGraphs, (self._rehearse,)

    def run(self, layer: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
        """Run a layer as a recording; None where it must be run as it is.

        Args:
            layer: the call of a module, its keyword arguments bound.
            args: its positional arguments: the hidden state.
        """
        found = self._prepared(layer, args)
        if found is None:
            return None
        recorded, values = found
        self.replayed += 1
        out: Tensor = Replay.apply(recorded, values, args[0], *recorded.trained)  # type: ignore[no-untyped-call]
        return out

    def _prepared(self, layer: Callable[..., Any], args: tuple[Any, ...]) -> _Prepared | None:
        if self._off or not isinstance(layer, partial) or not isinstance(layer.func, MethodType) or len(args) != 1:
            return None
        module, hidden, kwargs = layer.func.__self__, args[0], layer.keywords
        if not isinstance(module, nn.Module) or not self._suits(hidden):
            return None
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tokens = hidden.shape[-2]
        causal = _is_causal(module)
        if causal:
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith(_OF_MEDIA)}
        rounds = causal and can_round_up(kwargs)
        length = -(-tokens // ROUND_TO) * ROUND_TO if rounds else tokens
        about = describe(kwargs, tokens if rounds else None)
        if about is None:
            return None
        shape = (*hidden.shape[:-2], length, hidden.shape[-1])
        key = (type(module), shape, hidden.dtype, hidden.device, hidden.requires_grad, autocast, module.training, about)
        kind = self._stages.get(key)
        if kind is not None:
            self._stages.move_to_end(key)
            recorded = kind.layers.get(module)
            if recorded is not None and recorded.state.holds():
                return recorded, tuple(kwargs.values())
        elif not self._came_before(module, key):
            return None
        state = LayerState(module)
        if not state.recordable or (kind is not None and kind.unfit):
            return None
        if kind is None:
            kind = self._new_kind(key, Stage(hidden, kwargs, length, hidden.requires_grad))
        recorder = self._recorder_for(hidden.device)
        recorded = RecordedLayer(state, kind.stage, layer.func, recorder, autocast, self._copies)
        kind.stage.load_arguments(tuple(kwargs.values()))
        if not kind.layers and not recorded.warm_up():
            kind.unfit = True
            return None
        if not self._record(recorded, module):
            return None
        kind.layers[module] = recorded
        return recorded, tuple(kwargs.values())

    def _record(self, recorded: RecordedLayer, module: nn.Module) -> bool:
        try:
            recorded.record()
        except RuntimeError as error:
            self._off = True
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

    def _came_before(self, module: nn.Module, key: Key) -> bool:
        seen = self._seen.setdefault(module, set())
        if key in seen:
            return True
        if len(seen) > 64 * MOST_STAGES:  # shapes that never repeat
            seen.clear()
        seen.add(key)
        return False

    def _new_kind(self, key: Key, stage: Stage) -> _Kind:
        while len(self._stages) >= MOST_STAGES:
            self._stages.popitem(last=False)
        kind = self._stages[key] = _Kind(stage)
        logger.info("Recording %s for hidden states of shape %s.", key[0].__name__, tuple(key[1]))
        return kind

    def _recorder_for(self, device: torch.device) -> Recorder:
        if self._recorder is None:
            self._recorder = PlainRecorder() if self._rehearse else CudaRecorder(device)
        return self._recorder


class _Kind:
    """The layers that are recorded for one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.layers: dict[nn.Module, RecordedLayer] = {}
        self.unfit = False


def _is_causal(module: nn.Module) -> bool:
    """Whether a layer is one whose tokens see no later ones, so that zeros behind them change nothing."""
    from fvlm_core.fused.engine import kind_of

    return kind_of(module) == _FUSED_CAUSAL
