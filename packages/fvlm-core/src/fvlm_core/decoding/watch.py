"""Learning on the host what the device decided, two tokens late, so that the device never waits for the host."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAG = 2


class _Slot(NamedTuple):
    ended: Tensor
    tokens: Tensor
    event: torch.cuda.Event | None


class Watch:
    """Follows the steps of one generation.

    Args:
        batch: rows.
        device: where tokens are chosen.
        streamer: gets the tokens of each step, in order, none of a step after the last one; or None.
        watched: whether rows can end before the longest length.
    """

    def __init__(self, batch: int, device: torch.device, streamer: Any, watched: bool) -> None:
        self._streamer, self._needed = streamer, watched or streamer is not None
        self._watched, self._cuda = watched, device.type == "cuda"
        self._free = [self._slot(batch) for _ in range(LAG + 1)] if self._needed else []
        self._flying: deque[_Slot] = deque()
        self.seen = 0
        """Steps that are known to have happened before all rows had ended, the last of which may have ended them."""
        self.ended = False

    def _slot(self, batch: int) -> _Slot:
        event = torch.cuda.Event() if self._cuda else None
        return _Slot(
            torch.zeros(1, dtype=torch.bool, pin_memory=self._cuda),
            torch.zeros(batch, dtype=torch.int64, pin_memory=self._cuda),
            event,
        )

    def step(self, all_ended: Tensor, tokens: Tensor) -> bool:
        """Note one step, whose results may still be on their way; tell whether an earlier one has ended all rows."""
        if not self._needed:
            self.seen += 1
            return False
        slot = self._free.pop()
        slot.ended.copy_(all_ended, non_blocking=True)
        if self._streamer is not None:
            slot.tokens.copy_(tokens, non_blocking=True)
        if slot.event is not None:
            slot.event.record()
        self._flying.append(slot)
        while len(self._flying) > (LAG if self._cuda else 0):
            self._land()
        return self.ended

    def _land(self) -> None:
        slot = self._flying.popleft()
        if slot.event is not None:
            slot.event.synchronize()
        if not self.ended:
            self.seen += 1
            if self._streamer is not None:
                self._streamer.put(slot.tokens.clone())
            self.ended = self._watched and bool(slot.ended)
        self._free.append(slot)

    def finish(self) -> int:
        """Wait for what is on its way; return how many steps count."""
        while self._flying:
            self._land()
        return self.seen
