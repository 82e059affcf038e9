"""Memory that tensors pass through on their way from files to the arithmetic and on to files, used again and again.

Fresh memory for each large tensor costs the system more time than the merge. For a GPU it is page-locked: the copies
are then several times as fast, and once.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from fvlm_export.remote import Shard
from fvlm_export.safetensor_file import PIECE, Buffers, as_bytes

_LOCKED_AT_MOST = 1 << 29  # of memory that the system cannot take back


def warm_up(device: torch.device) -> None:
    """Have a GPU made ready in the background; what goes wrong there will go wrong again where it can be said."""
    if device.type == "cuda":
        with_it = ThreadPoolExecutor(1)
        with_it.submit(_multiply_there, device)
        with_it.shutdown(wait=False)


def _multiply_there(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        torch.zeros((16, 16), dtype=dtype, device=device).mm(torch.zeros((16, 16), dtype=dtype, device=device))


class Scratch:
    """A few buffers for each thread, used in turn.

    Args:
        count: how many.
        locked: whether buffers are page-locked, as far as they are not very large.
    """

    def __init__(self, count: int, *, locked: bool) -> None:
        self._count, self._locked, self._of_thread = count, locked, threading.local()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized CPU tensor, which holds until this thread has called ``count`` times more."""
        buffers: deque[torch.Tensor] = self._of_thread.__dict__.setdefault("buffers", deque())
        buffer = buffers.popleft() if len(buffers) == self._count else torch.empty(0, dtype=torch.uint8)
        size = math.prod(shape) * dtype.itemsize
        if buffer.nbytes < size:
            locked = self._locked and size <= _LOCKED_AT_MOST
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=locked)
        buffers.append(buffer)
        return buffer[:size].view(dtype).reshape(shape)


class Upload:
    """Copies tensors from files to a GPU, a piece at a time and past the files' memory maps."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def __call__(self, shard: Shard, name: str, device: torch.device) -> torch.Tensor:
        """Return a tensor of a file on a device.

        Raises:
            CheckpointError: the file was cut meanwhile.
        """
        info = shard.infos[name]
        value = torch.empty(info.nbytes, dtype=torch.uint8, device=device)
        done = 0
        for piece in shard.pieces(name, self._buffers(locked=device.type == "cuda")):
            part = torch.frombuffer(piece, dtype=torch.uint8)
            value[done : done + len(part)].copy_(part)
            done += len(part)
        return value.view(info.dtype).reshape(info.shape)

    def _buffers(self, *, locked: bool) -> Buffers:
        held = self._of_thread.__dict__
        if "buffers" not in held:
            both = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=locked) for _ in range(2)]
            held["buffers"] = Buffers([as_bytes(buffer) for buffer in both])
        found: Buffers = held["buffers"]
        return found
