"""Writing the planned shards, one tensor at a time.

For each shard four things go on at once: the values of one tensor are computed, the tensor before it is written, those
before that are read back to be hashed and checked, and what was written is hashed. A shard is finished when it has been
read back; meanwhile the next may be begun. Where there are cores and memory for it, several shards are written side by
side, each in a thread that computes and writes in turn: a file takes its bytes from one thread at a time, and a hash
too, so that several files fill faster than one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fvlm_export.clock import Clock
from fvlm_export.compute import Merger
from fvlm_export.follow import Follower
from fvlm_export.plan import Item, Plan
from fvlm_export.remote import Shard
from fvlm_export.resume import Journal
from fvlm_export.safetensor_file import Buffers, as_bytes
from fvlm_export.safetensor_writer import SafetensorWriter, WrittenFile
from fvlm_export.threads import torch_threads
from fvlm_export.verify import Verifier

_WORTH = 1 << 28  # bytes of a shard from which another one beside it pays
_LANES = 4


@dataclass(frozen=True)
class How:
    """How shards are written.

    Attributes:
        progress: show a bar in bytes.
        ahead: whether a shard may be begun before the one before it is finished and taken.
        lanes: how many shards are written side by side; 1 unless ``ahead``.
        durable: whether a shard is finished only when it is on the disk.
        clock: told what the time goes into.
    """

    progress: bool
    ahead: bool
    lanes: int
    durable: bool
    clock: Clock


@dataclass(frozen=True)
class _Written:
    """A shard that is written and may still be read back."""

    writer: SafetensorWriter
    follower: Follower
    on_disk: Future[None]

    def finish(self) -> WrittenFile:
        digest = self.follower.sha256()
        self.on_disk.result()
        names = tuple(info.name for info in self.writer.infos)
        return WrittenFile(self.writer.path.name, self.writer.size, digest, names)


def write_shards(
    plan: Plan, merger: Merger, folder: Path, journal: Journal, verifier: Verifier | None, how: How
) -> Iterator[tuple[int, WrittenFile]]:
    """Compute, write and check a plan's shards.

    Args:
        plan: what to write.
        merger: computes the values.
        folder: where.
        journal: of the folder: shards that it knows as finished are kept.
        verifier: checks what is read back; None: it is only hashed.
        how: see :class:`How`.

    Yields:
        Each shard's number and its file, in order, when it is finished.

    Raises:
        ExportError: what was read back is not what was meant.
    """
    with tqdm(total=plan.total, unit="B", unit_scale=True, desc="Merging", disable=not how.progress) as bar:
        desk = _Desk(plan, merger, folder, journal, verifier, how, bar)
        with torch_threads(_threads_of_each(how.lanes)), ThreadPoolExecutor(how.lanes) as pool:
            shards = [pool.submit(desk.shard, number) for number in range(len(plan.shards))]
            try:
                for number, shard in enumerate(shards):
                    done = shard.result()
                    if isinstance(done, _Written):
                        file = done.finish()
                        journal.note(file)
                    else:
                        file = done
                    yield number, file
                    desk.taken()
            finally:
                desk.close()
                pool.shutdown(cancel_futures=True)
                for shard in shards:
                    if not shard.cancelled() and shard.exception() is None:
                        left = shard.result()
                        if isinstance(left, _Written):
                            left.follower.stop()


def lanes_for(plan: Plan) -> int:
    """Return how many shards are best written side by side: never so many that their tensors at work exceed a shard."""
    sizes = [sum(item.nbytes for item in shard) for shard in plan.shards]
    at_work = max((item.nbytes for item in plan.items if item.changes or item.outputs != item.values), default=0)
    if min(sizes[:2]) < _WORTH:
        return 1
    possible = min(_LANES, _cores() // 2, len(sizes))
    return max([lanes for lanes in range(2, possible + 1) if lanes * at_work <= max(sizes)], default=1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _threads_of_each(lanes: int) -> int:
    """Share torch's threads among the lanes and the threads that check what they wrote."""
    return torch.get_num_threads() if lanes == 1 else max(1, torch.get_num_threads() // (2 * lanes))


class _Desk:
    """Where shards are written, by one thread or several."""

    def __init__(
        self,
        plan: Plan,
        merger: Merger,
        folder: Path,
        journal: Journal,
        verifier: Verifier | None,
        how: How,
        bar: tqdm,
    ) -> None:
        self._plan, self._merger, self._folder, self._journal = plan, merger, folder, journal
        self._verifier, self._how, self._bar = verifier, how, bar
        self._end, self._lock = len(plan.shards), threading.Lock()
        # How many shards may be begun and not taken: those being written, and some that are only read back any more
        self._room = threading.Semaphore(how.lanes + (how.lanes + 1) // 2 if how.ahead else 1)

    def taken(self) -> None:
        """Say that a finished shard has been taken: there is room to begin another."""
        self._room.release()

    def close(self, after: int = -1) -> None:
        """Have shards after this one broken off at their next tensor if they are being written, and else not begun."""
        with self._lock:
            self._end = min(self._end, after + 1)
        self._room.release(len(self._plan.shards))

    @torch.no_grad()
    def shard(self, number: int) -> _Written | WrittenFile:
        """Write a shard, or check one that an earlier run finished.

        Raises:
            CancelledError: the desk was closed, or an earlier shard failed.
        """
        self._room.acquire()
        with self._or_none_after(number):
            return self._made(number)

    @contextmanager
    def _or_none_after(self, number: int) -> Iterator[None]:
        """Let no shard after this one go on if it fails; those before it do: a later run can take them over."""
        try:
            yield
        except BaseException:
            self.close(number)
            raise

    def _made(self, number: int) -> _Written | WrittenFile:
        self._go_on(number)
        done = self._journal.finished(self._plan.file_name(number))
        if done is None:
            return self._write(number)
        if self._verifier is not None:
            with self._following(self._folder / done.name, number) as follower:
                for item in self._plan.shards[number]:
                    follower.wrote(item)
                follower.sha256()
        self._progress(sum(item.nbytes for item in self._plan.shards[number]))
        return done

    def _go_on(self, number: int) -> None:
        if number >= self._end:
            raise CancelledError

    def _progress(self, nbytes: int) -> None:
        with self._lock:
            self._bar.update(nbytes)

    @contextmanager
    def _following(self, path: Path, number: int) -> Iterator[Follower]:
        follower = Follower(path, number, self._verifier, self._merger.release, self._how.clock)
        try:
            yield follower
        except BaseException:
            follower.stop()
            raise

    def _write(self, number: int) -> _Written:
        merger, clock, shard = self._merger, self._how.clock, self._plan.shards[number]
        infos = [info for item in shard for info in item.outputs]
        buffers, path = Buffers(), self._folder / self._plan.file_name(number)
        with (
            SafetensorWriter(path, infos, durable=self._how.durable) as writer,
            ThreadPoolExecutor(1) as second,
            self._following(path, number) as follower,
            self._or_none_after(number),  # at once, before what was begun is wound up
        ):

            def put(item: Item, copied: Shard | None, values: dict[str, torch.Tensor]) -> None:
                with clock.during("write"):
                    for info in item.outputs:
                        pieces = [as_bytes(values[info.name])] if copied is None else copied.pieces(info.name, buffers)
                        writer.write(info.name, pieces)
                merger.release(item)
                follower.wrote(item)
                self._progress(item.nbytes)

            pending: Future[None] | None = None
            for item, after in zip(shard, [*shard[1:], None], strict=True):
                self._go_on(number)
                if after is not None:
                    merger.prefetch(after)
                file = merger.copied_from(item)
                with clock.during("compute"):
                    values = {} if file is not None else merger.outputs(item)  # meanwhile the one before is written
                if self._how.lanes > 1:
                    put(item, file, values)
                    continue
                if pending is not None:
                    pending.result()
                pending = second.submit(put, item, file, values)
            if pending is not None:
                pending.result()
            return _Written(writer, follower, writer.finish())
