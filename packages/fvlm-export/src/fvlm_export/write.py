"""Writing the planned shards, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fvlm_export.compute import Merger
from fvlm_export.plan import Item, Plan
from fvlm_export.remote import Shard
from fvlm_export.resume import Journal
from fvlm_export.safetensor_file import SafetensorWriter, WrittenFile, as_bytes


def write_shards(
    plan: Plan, merger: Merger, folder: Path, journal: Journal, *, progress: bool
) -> Iterator[tuple[int, WrittenFile]]:
    """Compute and write a plan's shards one after the other.

    Args:
        plan: what to write.
        merger: computes the values.
        folder: where.
        journal: of the folder: shards that it knows as finished are kept.
        progress: show a bar in bytes.

    Yields:
        Each shard's number and its file, as soon as it is written.
    """
    with tqdm(total=plan.total, unit="B", unit_scale=True, desc="Merging", disable=not progress) as bar:
        for number, shard in enumerate(plan.shards):
            done = journal.finished(plan.file_name(number))
            if done is None:
                done = _write(plan, number, merger, folder, bar)
                journal.note(done)
            else:
                bar.update(sum(item.nbytes for item in shard))
            yield number, done


def _write(plan: Plan, number: int, merger: Merger, folder: Path, bar: tqdm) -> WrittenFile:
    shard = plan.shards[number]
    infos = [info for item in shard for info in item.outputs]
    with SafetensorWriter(folder / plan.file_name(number), infos) as writer, ThreadPoolExecutor(1) as thread:
        pending: Future[None] | None = None
        for item in shard:
            file = merger.copied_from(item)
            values = {} if file is not None else merger.outputs(item)  # meanwhile the item before is being written
            if pending is not None:
                pending.result()
            pending = thread.submit(_put, writer, item, file, values, merger, bar)
        if pending is not None:
            pending.result()
        return writer.finish()


def _put(
    writer: SafetensorWriter,
    item: Item,
    copied: Shard | None,
    values: dict[str, torch.Tensor],
    merger: Merger,
    bar: tqdm,
) -> None:
    for info in item.outputs:
        pieces = [as_bytes(values[info.name])] if copied is None else copied.pieces(info.name)
        writer.write(info.name, pieces)
    merger.release(item)
    bar.update(item.nbytes)
