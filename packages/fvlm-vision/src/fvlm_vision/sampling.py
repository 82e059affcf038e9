"""Samplers that go by length, told how many tokens each sample will have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import datasets

from fvlm_core.errors import ConfigError
from fvlm_vision.collator import FastVisionDataCollator

if TYPE_CHECKING:
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
