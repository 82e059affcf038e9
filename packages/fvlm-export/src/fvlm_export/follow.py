"""Reading a file back while it is being written: one pass that gives its hash and the proof of what it holds.

The reader runs some tensors behind the writer, in a thread of its own, so that hashing (the slowest thing in a merge
on a fast disk) and proving cost no time of their own. A shard may still be read back while the next is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from fvlm_export.clock import Clock
from fvlm_export.plan import Item
from fvlm_export.safetensor_file import Buffers, SafetensorFile, TensorInfo
from fvlm_export.verify import Verifier


class Follower:
    """Reads one file back behind its writer.

    Args:
        path: the file; its header is written.
        number: of the shard in the plan.
        verifier: what is checked on the way; None: nothing is.
        release: told of every item when it has been read back.
        clock: told what the time goes into.
    """

    def __init__(
        self, path: Path, number: int, verifier: Verifier | None, release: Callable[[Item], None], clock: Clock
    ) -> None:
        self._path, self._number, self._verifier, self._release = path, number, verifier, release
        self._clock = clock
        self._written: SimpleQueue[Item | None] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1)
        self._done: Future[str] = self._thread.submit(self._run)
        self._thread.shutdown(wait=False)

    def wrote(self, item: Item) -> None:
        """Say that an item is in the file.

        Raises:
            ExportError: something that was read back before was not as it should be.
        """
        self._written.put(item)
        if self._done.done():
            self._done.result()

    def stop(self) -> None:
        """Read no further than what has been announced, and wait until that is read."""
        self._written.put(None)
        self._done.exception()

    def sha256(self) -> str:
        """Return the hash of the whole file, when it has been read back."""
        self._written.put(None)
        return self._done.result()

    def _run(self) -> str:
        file, buffers = SafetensorFile(self._path), Buffers()
        if self._verifier is not None:
            self._verifier.check_header(self._number, file)
        with _Digest(self._clock) as digest:
            with self._path.open("rb") as raw:
                digest.update(memoryview(raw.read(file.start)))
            while (item := self._written.get()) is not None:
                for info in item.outputs:
                    pieces = iter(self._checked(item, info, file.pieces(info.name, buffers)))
                    while True:
                        with self._clock.during("read back"):
                            piece = next(pieces, None)
                        if piece is None:
                            break
                        digest.update(piece)
                if self._verifier is not None:
                    with self._clock.during("recompute"):
                        self._verifier.check_item(item, file)
                for info in item.outputs:
                    file.release(info.name)
                self._release(item)
            return digest.finish()

    def _checked(self, item: Item, info: TensorInfo, pieces: Iterable[memoryview]) -> Iterable[memoryview]:
        return pieces if self._verifier is None else self._verifier.watched(item, info, pieces)


class _Digest:
    """SHA-256, a piece behind: while one is hashed, the next may be read and checked."""

    def __init__(self, clock: Clock) -> None:
        self._hash, self._clock = hashlib.sha256(), clock
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> _Digest:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown()

    def update(self, piece: memoryview) -> None:
        """Hash a piece, which must hold until the call after the next."""
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._add, piece)

    def _add(self, piece: memoryview) -> None:
        with self._clock.during("hash"):
            self._hash.update(piece)

    def finish(self) -> str:
        """Return the hash in hexadecimal."""
        if self._last is not None:
            self._last.result()
        return self._hash.hexdigest()
