"""How samples reach the model: samplers told how long each will be, and pixels that are bytes on the way."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import datasets
from torch.utils.data import IterableDataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from trl import SFTTrainer

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.pixels import with_pixel_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import TrainingArguments


class Measured:
    """The lengths of a trainer's datasets, counted once each."""

    def __init__(self) -> None:
        self._counted: WeakKeyDictionary[Any, datasets.Dataset] = WeakKeyDictionary()

    def stand_in(self, rows: Any, args: TrainingArguments, collator: Any) -> Any:
        """Return a column of lengths for `transformers.Trainer` to make its sampler of, in the place of the rows.

        Args:
            rows: the dataset.
            args: of the trainer; unless they choose a sampler that goes by length, `rows` is returned.
            collator: of the trainer; it counts media as it will make them.

        Raises:
            ConfigError: the collator is of another kind, so nothing knows what media will take.
            DataError: a row cannot be used.
        """
        strategy, column = args.train_sampling_strategy, args.length_column_name
        if strategy not in ("group_by_length", "batch_rebalance") or rows is None or not hasattr(rows, "__len__"):
            return rows
        if not isinstance(collator, FastVisionDataCollator):
            raise ConfigError(
                f"train_sampling_strategy={strategy!r} needs a FastVisionDataCollator to count tokens; leave one of "
                "the two out."
            )
        if rows not in self._counted:
            lengths = collator.token_counter().lengths(rows, column)
            self._counted[rows] = datasets.Dataset.from_dict({column: lengths})
        return self._counted[rows]


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Give a `DataError` from a dataloader worker its own words back, which torch buries in the worker's traceback."""
    try:
        yield
    except DataError as error:
        if not error.reason.startswith("Caught DataError in DataLoader worker"):
            raise
        reason = error.reason.rpartition("DataError: ")[2].strip()
        match = re.match(r"row (\d+): ", reason)
        raise (DataError(reason) if match is None else DataError(reason[match.end() :], int(match[1]))) from None


class LoadingTrainer(SFTTrainer):
    """A `trl.SFTTrainer` whose dataloaders know what a `FastVisionDataCollator` does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._measured = Measured()
        super().__init__(*args, **kwargs)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """Return what the workers call: pixels stay bytes on the way to the device."""
        if isinstance(data_collator, FastVisionDataCollator):
            return data_collator.keeping_bytes()
        return super()._get_collator_with_removed_columns(data_collator, description)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of a step from the dataloader.

        Raises:
            DataError: a row cannot be used.
        """
        with errors_of_workers():
            return super().get_batch_samples(*args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Return how many epochs are behind a resumed run, and how many batches of the one that it goes on in.

        Of a stream transformers takes all steps for those of the first epoch, and would begin the second anew.
        """
        found: tuple[int, int] = super()._init_training_state(
            max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or not isinstance(self.train_dataset, IterableDataset):
            return found
        path = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
        saved = TrainerState.load_from_json(str(path)) if path.is_file() else TrainerState()
        if not saved.epoch or saved.epoch <= 1:  # 1 is the end of max_steps, wherever the stream then stood
            return found
        epoch, share = divmod(saved.epoch, 1)
        batches = saved.max_steps * self.args.gradient_accumulation_steps  # what the trainer takes for an epoch's
        return int(epoch), 0 if self.args.ignore_data_skip else round(share * batches)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict over a dataloader.

        Raises:
            DataError: a row cannot be used.
        """
        with errors_of_workers():
            return super().evaluation_loop(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the device, its pixels as the model takes them."""
        return with_pixel_values(super()._prepare_inputs(inputs))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[Any] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(self._measured.stand_in(rows, self.args, self.data_collator))

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler[Any] | None:
        return super()._get_eval_sampler(self._measured.stand_in(eval_dataset, self.args, self.data_collator))
