"""Doing something again after memory ran out, as if for the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class RandomState:
    """Where the generators of the host and of one device stand now.

    Args:
        device: any; only CUDA devices have a generator beside the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> bool:
        """Set the generators back; return True, for use behind a condition."""
        torch.set_rng_state(self._host)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
        return True


def once_more(work: Callable[[], Result], prepare: Callable[[], bool]) -> Result:
    """Return ``work()``; if device memory runs out in it, prepare, and return what it gives the second time.

    Args:
        work: to be done; where it fails it has changed nothing that ``prepare`` does not restore.
        prepare: gives memory back; returns whether it is worth trying again.

    Raises:
        torch.OutOfMemoryError: it ran out the second time, or nothing could be given back.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        if not prepare():
            raise
    return work()  # here nothing holds what the failed one had made
