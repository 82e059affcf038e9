"""Doing something again after memory ran out, as if for the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class RandomState:
    """Where the generators of the host and of devices stand now.

    Args:
        devices: any; only CUDA devices have a generator beside the host's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._host = torch.get_rng_state()
        self._on_devices = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def restore(self) -> bool:
        """Set the generators back; return True, for use behind a condition."""
        torch.set_rng_state(self._host)
        for device, state in self._on_devices.items():
            torch.cuda.set_rng_state(state, device)
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
