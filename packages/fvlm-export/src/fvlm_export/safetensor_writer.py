"""One safetensors file, written tensor by tensor in a known order.

No tensor need be in memory but the one being written, because every name, dtype and shape is known before the first
byte. A file that must be on the disk when it is finished keeps the disk busy meanwhile: what was written is flushed in
the background, so that the end need not wait for all of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fvlm_core.errors import ExportError
from fvlm_export.safetensor_file import DTYPE_NAMES, TensorInfo

_FLUSH = 1 << 28  # bytes between two flushes


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its name in the folder, its size and the SHA-256 of its bytes."""

    name: str
    size: int
    sha256: str
    tensors: tuple[str, ...] = field(default=(), compare=False)


class SafetensorWriter:
    """Writes one safetensors file, tensor by tensor in the order given.

    Args:
        path: where; must not exist. It has its final size at once, so that it can be read as far as it is written.
        infos: every tensor, in the order in which they will be written.
        durable: whether the file is finished only when it is on the disk, or when the system has it, as with `cp`.

    Raises:
        ExportError: a tensor comes out of order or with another size, or has a dtype that the format does not know.
        OSError: the disk is full or read-only.
    """

    def __init__(self, path: Path, infos: Iterable[TensorInfo], *, durable: bool = True) -> None:
        self.path, self._durable = path, durable
        self.infos = list(infos)
        header = _header(self.infos)
        self.size = len(header) + sum(info.nbytes for info in self.infos)
        self._pending: Iterator[TensorInfo] = iter(self.infos)
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._flusher = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._since_flush = 0
        os.ftruncate(self._file.fileno(), self.size)
        self._put(header)

    def __enter__(self) -> SafetensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        failed = kind is not None
        self._flusher.shutdown(wait=failed, cancel_futures=failed)
        if failed:
            self._file.close()

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Append one tensor's bytes, in one piece or several."""
        info = next(self._pending, None)
        written = 0
        for piece in pieces:
            self._put(piece)
            written += piece.nbytes
        if info is None or info.name != name or info.nbytes != written:
            raise ExportError(
                f"tensor {name!r} came to {self.path.name} with {written:,} bytes where {info} was planned; "
                "this is an error in fvlm_export, please report it."
            )

    def _put(self, data: memoryview | bytes) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + (1 << 30)]) or 0
        self._since_flush += len(view)
        if self._durable and self._since_flush >= _FLUSH and (self._flushed is None or self._flushed.done()):
            self._flush()

    def _flush(self) -> None:
        if self._flushed is not None:
            self._flushed.result()
        self._since_flush = 0
        self._flushed = self._flusher.submit(os.fdatasync, self._file.fileno())

    def finish(self) -> Future[None]:
        """Say that all is written, and close the file; if it is durable, once it is on the disk.

        Returns:
            Done when the file is closed.

        Raises:
            ExportError: a tensor is missing.
        """
        left = next(self._pending, None)
        if left is not None:
            raise ExportError(f"{self.path.name} lacks tensor {left.name!r}; this is an error in fvlm_export.")
        return self._flusher.submit(self._close)

    def _close(self) -> None:
        if self._flushed is not None:
            self._flushed.result()
        if self._durable:
            os.fsync(self._file.fileno())
        self._file.close()


def _header(infos: list[TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in infos:
        if info.dtype not in DTYPE_NAMES:
            raise ExportError(
                f"tensor {info.name!r} has dtype {info.dtype}, which safetensors cannot hold; pass dtype=."
            )
        entries[info.name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
