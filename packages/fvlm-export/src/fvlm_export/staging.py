"""Memory that tensors pass through on their way from files to the arithmetic and on to files, used again and again.

Fresh memory for each large tensor costs the system more time than the merge. For a GPU it is page-locked: the copies
are then several times as fast, and once.
"""

from __future__ import annotations

import math
import threading

import torch

from fvlm_export.remote import Shard
from fvlm_export.safetensor_file import Buffers, as_bytes

_PIECE = 1 << 24
_LOCKED_AT_MOST = 1 << 29  # of memory that the system cannot take back


class Scratch:
    """Two buffers for each thread, used in turn.

    Args:
        locked: whether buffers are page-locked, as far as they are not very large.
    """

    def __init__(self, *, locked: bool) -> None:
        self._locked, self._of_thread = locked, threading.local()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized CPU tensor, which holds until this thread's call after the next."""
        buffers: list[torch.Tensor] = self._of_thread.__dict__.setdefault("buffers", [torch.empty(0), torch.empty(0)])
        buffers.reverse()
        size = math.prod(shape) * dtype.itemsize
        if buffers[0].nbytes < size:
            locked = self._locked and size <= _LOCKED_AT_MOST
            buffers[0] = torch.empty(size, dtype=torch.uint8, pin_memory=locked)
        return buffers[0][:size].view(dtype).reshape(shape)


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
            both = [torch.empty(_PIECE, dtype=torch.uint8, pin_memory=locked) for _ in range(2)]
            held["buffers"] = Buffers([as_bytes(buffer) for buffer in both])
        found: Buffers = held["buffers"]
        return found
