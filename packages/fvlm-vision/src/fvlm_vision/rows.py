"""Samples that know their row number, so that an error can name it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
from torch.utils.data import Dataset

from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


class NumberedSample(dict[str, Any]):
    """A sample with its row number in the dataset, as the attribute `row`; otherwise the plain dict that it was."""

    def __init__(self, sample: Mapping[str, Any], row: int) -> None:
        super().__init__(sample)
        self.row = row

    def __reduce__(self) -> tuple[type[NumberedSample], tuple[dict[str, Any], int]]:
        return type(self), (dict(self), self.row)


class NumberedRows(Dataset[Any]):
    """A map-style dataset over any sequence. Rows that are mappings come out as `NumberedSample`.

    Args:
        rows: anything with a length and integer indices: a list, a `datasets.Dataset`, a torch dataset.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        sample = self.rows[index]
        return NumberedSample(sample, index) if isinstance(sample, dict) else sample


def training_rows(dataset: Any, name: str, *, numbered: bool = True) -> Any:
    """Return what a trainer iterates over: rows of anything with a length, or a stream as it is.

    Images of a `datasets.Dataset` are left encoded, so that the collator decodes them under its own limits and can
    say which row holds a corrupt one.

    Args:
        dataset: what the user gave.
        name: of the argument it was given for.
        numbered: whether mappings come out as `NumberedSample`. A collator of the user's own gets its samples as they
            are in the dataset: the same objects of a list, every time.

    Raises:
        ConfigError: it is missing, empty, or neither a sequence nor a stream; `name` is the argument.
    """
    if dataset is None:
        raise ConfigError(f"{name} is missing; pass a list of samples or a dataset.")
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.decode(False) if dataset.features is not None else dataset
    if isinstance(dataset, str | dict) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"{name} is a {type(dataset).__name__}; pass a list of samples, a dataset with a length, or a "
            "datasets.IterableDataset."
        )
    if len(dataset) == 0:
        raise ConfigError(f"{name} is empty; pass at least one sample.")
    if isinstance(dataset, datasets.Dataset):
        dataset = _undecoded(dataset)
    return NumberedRows(dataset) if numbered and not isinstance(dataset, NumberedRows) else dataset


def _undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    features = dataset.features.copy()
    changed = {name: _without_decoding(feature) for name, feature in features.items()}
    return dataset if changed == dict(features) else dataset.cast(datasets.Features(changed))


def _without_decoding(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, dict):
        return {name: _without_decoding(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_without_decoding(feature.feature), length=feature.length)
    if isinstance(feature, list):
        return [_without_decoding(part) for part in feature]
    return feature
