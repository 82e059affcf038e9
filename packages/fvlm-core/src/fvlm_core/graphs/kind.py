"""The layers that are recorded for one stage, and what each of them may keep when it is recorded."""

from __future__ import annotations

import logging

import torch
from torch import nn

from fvlm_core.graphs.layer import RecordedLayer
from fvlm_core.graphs.room import Room
from fvlm_core.graphs.stage import Stage

logger = logging.getLogger(__name__)


class Kind:
    """The layers that are recorded for one stage.

    Args:
        stage: the memory that they work on.

    Attributes:
        layers: the recorded ones.
        unfit: whether layers of this kind turned out to be none that can be recorded.
        kept_bytes: how much one of them holds that keeps what it computes, by the last of those; 0 before one does.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.layers: dict[nn.Module, RecordedLayer] = {}
        self.unfit = self._told = False
        self.kept_bytes = 0

    def record(self, recorded: RecordedLayer, module: nn.Module, keep: bool, room: Room) -> None:
        """Record a layer, in the place of what was recorded of it before, and count what it keeps.

        Args:
            recorded: the layer.
            module: whose it is.
            keep: whether it is to keep what it computes, if there is room.
            room: how much may be kept.

        Raises:
            torch.OutOfMemoryError: memory does not suffice, even if the layer keeps nothing.
            RuntimeError: the layer does something that cannot be recorded.
        """
        device = self.stage.x.device
        self._let_go(module, room)
        before = room.allocated(device)
        keep = keep and recorded.has_gradients
        fits = keep and room.has_for(self.kept_bytes, device)
        if not (fits and self._keeps(recorded, module, room)):
            recorded.record(False)
        if recorded.kept:
            recorded.kept_bytes = self.kept_bytes = room.taken_since(before, device)
            room.kept_bytes += self.kept_bytes
        elif keep and not fits:
            self._tell(module, room)
            room.warn(device)
        self.layers[module] = recorded

    def _keeps(self, recorded: RecordedLayer, module: nn.Module, room: Room) -> bool:
        """Record a layer that keeps what it computes; False where that does not fit after all."""
        try:
            recorded.record(True)
            return True
        except torch.OutOfMemoryError:
            recorded.forget_kept()
        room.close()
        self._tell(module, room)
        if self.stage.x.is_cuda:
            torch.cuda.empty_cache()  # what records finds no memory that is cached elsewhere
        return False

    def _tell(self, module: nn.Module, room: Room) -> None:
        if not self._told:
            self._told = True
            logger.info(
                "No room for more than %d kept layers of %s (%s): the others compute again in the backward pass.",
                len(self.layers),
                type(module).__name__,
                room.describe(self.stage.x.device),
            )

    def _let_go(self, module: nn.Module, room: Room) -> None:
        """Count what was recorded of a layer as gone: it is, but for a backward pass that is still due."""
        old = self.layers.pop(module, None)
        if old is not None:
            room.kept_bytes -= old.kept_bytes

    def drop(self, room: Room) -> None:
        """Count all recordings as gone."""
        for module in list(self.layers):
            self._let_go(module, room)

    def release(self) -> None:
        """Free all recordings; backward passes that are still due compute again what is gone."""
        for layer in self.layers.values():
            layer.release()
        self.layers.clear()
        self._told = False
