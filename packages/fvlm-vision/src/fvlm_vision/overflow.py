"""How many samples were over `max_seq_length`, counted across dataloader workers and told once an epoch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_ROWS_KEPT = 5
_SLOTS = 257  # the main process and 256 workers; more would share, and might lose a count to each other
_TRUNCATED, _SKIPPED = 0, 1
_DONE = ("cut to", "left out for being over")


class OverflowCounts:
    """How many samples were cut or left out so far, and the first few.

    The counts lie in shared memory, a slot for each process, so that the main process sees what its dataloader workers
    (forked or spawned) count. They may be read at any time, and are whole when the workers rest.
    """

    def __init__(self) -> None:
        # (slots, kinds, 1 + rows): a count, then the first numbers; a sample's row, or -1 - its place in the batch
        self._slots = torch.zeros(_SLOTS, 2, 1 + _ROWS_KEPT, dtype=torch.int64).share_memory_()
        self._earlier = torch.zeros(2, dtype=torch.int64)

    @property
    def truncated(self) -> int:
        """How many samples lost trailing text."""
        return self._total(_TRUNCATED)

    @property
    def skipped(self) -> int:
        """How many samples were left out."""
        return self._total(_SKIPPED)

    def note(self, skipped: bool, row: int | None, place: int, limit: int | None, *, log: bool) -> None:
        """Count a sample.

        Args:
            skipped: left out; else its trailing text was cut.
            row: its row in the dataset, where it carries one.
            place: its number in the batch.
            limit: the tokens it may have.
            log: whether the 1st, 10th, 100th, … is said at once (where nothing tells it once an epoch).
        """
        worker = get_worker_info()
        kind = _SKIPPED if skipped else _TRUNCATED
        slot = self._slots[0 if worker is None else (worker.id + 1) % _SLOTS, kind]
        count = int(slot[0])
        if count < _ROWS_KEPT:
            slot[1 + count] = row if row is not None else -1 - place
        slot[0] = count + 1
        if log and str(count + 1).strip("0") == "1":
            logger.warning(_sentence(count + 1, kind, limit, slot[1 : 2 + count].tolist()))

    def take(self) -> tuple[Tensor, list[list[int]]]:
        """Return what was counted since the last time, and start again; `truncated` and `skipped` stand.

        Returns:
            Counts of truncated and skipped samples, shape (2,), int64; and of each the first few numbers, in order.
        """
        counts = self._slots[:, :, 0].sum(dim=0)
        first: list[list[int]] = []
        for kind in (_TRUNCATED, _SKIPPED):
            kept = [slot[1 : 1 + min(int(slot[0]), _ROWS_KEPT)].tolist() for slot in self._slots[:, kind]]
            first.append(sorted(number for numbers in kept for number in numbers)[:_ROWS_KEPT])
        self._earlier += counts
        self._slots.zero_()
        return counts, first

    def _total(self, kind: int) -> int:
        return int(self._earlier[kind] + self._slots[:, kind, 0].sum())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._slots.share_memory_()  # does nothing to what came into a spawned worker as shared memory


class OverflowLog(TrainerCallback):
    """Says once an epoch how many samples were over the limit, on all processes together.

    Args:
        trainer: its accelerator sums over the processes.
        counts: of its collator.
        limit: the tokens that a sample may have.
    """

    def __init__(self, trainer: Any, counts: OverflowCounts, limit: int | None) -> None:
        self.trainer = trainer
        self.counts = counts
        self.limit = limit

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Log what this epoch's batches had, and any evaluation since the last time."""
        self._tell()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Log what an epoch had that `max_steps` ended."""
        self._tell()

    def _tell(self) -> None:
        counts, first = self.counts.take()
        accelerator = self.trainer.accelerator
        total = accelerator.reduce(counts.to(accelerator.device), reduction="sum").tolist()
        if accelerator.is_main_process:
            for kind in (_TRUNCATED, _SKIPPED):
                if total[kind]:
                    logger.warning("This epoch %s", _sentence(total[kind], kind, self.limit, first[kind]))


def _sentence(count: int, kind: int, limit: int | None, numbers: list[int]) -> str:
    verb = "sample was" if count == 1 else "samples were"
    places = [f"row {n}" if n >= 0 else f"sample {-1 - n} of a batch" for n in numbers[:_ROWS_KEPT]]
    told = f"; first: {', '.join(places)}" if places else ""
    return f"{count} {verb} {_DONE[kind]} max_seq_length={limit} tokens{told}."
