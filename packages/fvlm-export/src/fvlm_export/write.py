"""Writing the planned shards, one tensor at a time.

Four things go on at once: the values of one tensor are computed, the tensor before it is written, those before that are
read back to be hashed and checked, and the disk takes up what was written. A shard is finished when it has been read
back and is on the disk; meanwhile the next may be begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fvlm_export.compute import Merger
from fvlm_export.follow import Follower
from fvlm_export.plan import Item, Plan
from fvlm_export.remote import Shard
from fvlm_export.resume import Journal
from fvlm_export.safetensor_file import Buffers, as_bytes
from fvlm_export.safetensor_writer import SafetensorWriter, WrittenFile
from fvlm_export.verify import Verifier


@dataclass(frozen=True)
class _Written:
    """A shard that is written and may still be read back."""

    number: int
    writer: SafetensorWriter
    follower: Follower
    on_disk: Future[None]

    def finish(self) -> WrittenFile:
        digest = self.follower.sha256()
        self.on_disk.result()
        names = tuple(info.name for info in self.writer.infos)
        return WrittenFile(self.writer.path.name, self.writer.size, digest, names)


def write_shards(
    plan: Plan,
    merger: Merger,
    folder: Path,
    journal: Journal,
    verifier: Verifier | None,
    *,
    progress: bool,
    ahead: bool,
) -> Iterator[tuple[int, WrittenFile]]:
    """Compute, write and check a plan's shards one after the other.

    Args:
        plan: what to write.
        merger: computes the values.
        folder: where.
        journal: of the folder: shards that it knows as finished are kept.
        verifier: checks what is read back; None: it is only hashed.
        progress: show a bar in bytes.
        ahead: whether a shard may be begun before the one before it is finished.

    Yields:
        Each shard's number and its file, as soon as it is finished.

    Raises:
        ExportError: what was read back is not what was meant.
    """
    unfinished: deque[_Written] = deque()
    bar = tqdm(total=plan.total, unit="B", unit_scale=True, desc="Merging", disable=not progress)
    try:
        for number, shard in enumerate(plan.shards):
            done = journal.finished(plan.file_name(number))
            if done is None:
                unfinished.append(_write(plan, number, merger, folder, verifier, bar))
            while unfinished and (done is not None or not ahead or len(unfinished) > 1):
                yield _noted(unfinished.popleft(), journal)
            if done is not None:
                _read_back(plan, number, merger, folder / done.name, verifier)
                bar.update(sum(item.nbytes for item in shard))
                yield number, done
        while unfinished:
            yield _noted(unfinished.popleft(), journal)
    finally:
        for left in unfinished:
            left.follower.stop()
        bar.close()


def _noted(shard: _Written, journal: Journal) -> tuple[int, WrittenFile]:
    file = shard.finish()
    journal.note(file)
    return shard.number, file


def _read_back(plan: Plan, number: int, merger: Merger, path: Path, verifier: Verifier | None) -> None:
    """Check a shard that an earlier run finished; its hash is known."""
    if verifier is not None:
        with _following(path, number, verifier, merger.release) as follower:
            for item in plan.shards[number]:
                follower.wrote(item)
            follower.sha256()


@contextmanager
def _following(
    path: Path, number: int, verifier: Verifier | None, release: Callable[[Item], None]
) -> Iterator[Follower]:
    follower = Follower(path, number, verifier, release)
    try:
        yield follower
    except BaseException:
        follower.stop()
        raise


def _write(plan: Plan, number: int, merger: Merger, folder: Path, verifier: Verifier | None, bar: tqdm) -> _Written:
    shard = plan.shards[number]
    infos = [info for item in shard for info in item.outputs]
    buffers = Buffers()
    with (
        SafetensorWriter(folder / plan.file_name(number), infos) as writer,
        ThreadPoolExecutor(1) as thread,
        _following(writer.path, number, verifier, merger.release) as follower,
    ):

        def put(item: Item, copied: Shard | None, values: dict[str, torch.Tensor]) -> None:
            for info in item.outputs:
                pieces = [as_bytes(values[info.name])] if copied is None else copied.pieces(info.name, buffers)
                writer.write(info.name, pieces)
            merger.release(item)
            follower.wrote(item)
            bar.update(item.nbytes)

        pending: Future[None] | None = None
        for item, after in zip(shard, [*shard[1:], None], strict=True):
            if after is not None:
                merger.prefetch(after)
            file = merger.copied_from(item)
            values = {} if file is not None else merger.outputs(item)  # meanwhile the item before is being written
            if pending is not None:
                pending.result()
            pending = thread.submit(put, item, file, values)
        if pending is not None:
            pending.result()
        return _Written(number, writer, follower, writer.finish())
