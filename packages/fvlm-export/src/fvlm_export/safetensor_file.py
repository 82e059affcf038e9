"""One safetensors file, read by memory map, tensor by tensor.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little-endian; the header,
a JSON object ``{name: {"dtype", "shape", "data_offsets"}}``; then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fvlm_core.errors import CheckpointError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
PIECE = 1 << 23  # bytes read at once where a tensor is read piece by piece
_HASHED = 1 << 25  # bytes hashed at once: a thread that hashes seldom waits for one that runs Python


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, dtype and shape, before its values are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a CPU tensor's bytes without copying them, unless it is not contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()  # numpy's arrays are buffers, which their annotation does not say
    return memoryview(data)


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that a header means.

    Raises:
        CheckpointError: torch has none.
    """
    if name not in _DTYPES:
        raise CheckpointError(f"dtype {name!r} in a safetensors header is not known; update fvlm-export.")
    return _DTYPES[name]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_HASHED, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


class Buffers:
    """Two buffers of one size, handed out in turn: what was read last stays while the next is being read."""

    def __init__(self, buffers: Sequence[memoryview] = ()) -> None:
        self._buffers = list(buffers) or [memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE))]

    def take(self) -> memoryview:
        """Return the buffer that was handed out the time before last."""
        self._buffers.reverse()
        return self._buffers[0]


class SafetensorFile:
    """A safetensors file under a memory map.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not one of a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size, header, self._start = _read_header(path)
        header.pop("__metadata__", None)
        self.infos: dict[str, TensorInfo] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            self._add(name, entry, size)
        with path.open("rb") as file:
            # A private map: torch wants a writable buffer, and nothing ever reaches the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _add(self, name: str, entry: dict[str, object], size: int) -> None:
        try:
            begin, end = (int(x) for x in entry["data_offsets"])  # type: ignore[attr-defined]
            shape = tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]
            info = TensorInfo(name, _DTYPES[str(entry["dtype"])], shape)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} describes tensor {name!r} in a way that cannot be read ({entry!r}); get the file again."
            ) from error
        if end - begin != info.nbytes or self._start + end > size:
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {self._start + end:,} of {size:,}; "
                "get the file again."
            )
        self.infos[name] = info
        self._spans[name] = (self._start + begin, self._start + end)

    @property
    def start(self) -> int:
        """Where the first tensor begins; what stands before it is the header."""
        return self._start

    def pieces(self, name: str, buffers: Buffers) -> Iterator[memoryview]:
        """Read a tensor's bytes piece by piece, past the map; each piece holds until the next but one."""
        begin, end = self._spans[name]
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end:
                buffer = buffers.take()[: end - begin]
                self._fill(file, buffer)
                yield buffer
                begin += len(buffer)

    def read(self, name: str, into: memoryview) -> None:
        """Read a tensor's bytes, past the map.

        Args:
            name: the tensor.
            into: as large as the tensor.

        Raises:
            CheckpointError: the file was cut meanwhile.
        """
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._spans[name][0])
            self._fill(file, into)

    def _fill(self, file: BinaryIO, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]  # which unbuffered files have
            if not count:
                raise CheckpointError(f"{self.path} was cut while it was read; get the file again.")
            done += count

    def prefetch(self, name: str) -> None:
        """Have the system begin to read a tensor from the disk."""
        begin, end = self._spans[name]
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            self._map.madvise(mmap.MADV_WILLNEED, first, end - first)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor over the map, on the CPU; do not write to it."""
        info, (begin, end) = self.infos[name], self._spans[name]
        if begin == end:
            return torch.empty(info.shape, dtype=info.dtype)
        if begin % info.dtype.itemsize:
            return torch.frombuffer(bytearray(self._map[begin:end]), dtype=info.dtype).reshape(info.shape)
        count = (end - begin) // info.dtype.itemsize
        return torch.frombuffer(self._map, dtype=info.dtype, count=count, offset=begin).reshape(info.shape)

    def small(self, name: str) -> torch.Tensor:
        """Return a tensor, as :meth:`tensor` does."""
        return self.tensor(name)

    def drop(self) -> None:
        """Nothing: the file is not ours to delete."""

    def release(self, name: str) -> None:
        """Give the pages that hold only this tensor back to the system (they are read again if touched again)."""
        begin, end = self._spans[name]
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def _read_header(path: Path) -> tuple[int, dict[str, dict[str, object]], int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is truncated or no safetensors file; get the file again.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} has no readable safetensors header; get the file again.") from error
    return size, header, 8 + length
