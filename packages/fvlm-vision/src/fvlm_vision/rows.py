"""Samples that know their row number, so that an error can name it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class NumberedSample(dict[str, Any]):
    """A sample with its row number in the dataset, as the attribute `row`; otherwise the plain dict that it was."""

    def __init__(self, sample: Mapping[str, Any], row: int) -> None:
        super().__init__(sample)
        self.row = row

    def __reduce__(self) -> tuple[type[NumberedSample], tuple[dict[str, Any], int]]:
        return type(self), (dict(self), self.row)


class PlacedSample(dict[str, Any]):
    """A sample that knows what messages should call it ("train.jsonl, line 7"), as the attribute `place`."""

    def __init__(self, sample: Mapping[str, Any], place: str) -> None:
        super().__init__(sample)
        self.place = place

    def __reduce__(self) -> tuple[type[PlacedSample], tuple[dict[str, Any], str]]:
        return type(self), (dict(self), self.place)


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


class StreamedRows(IterableDataset[Any]):
    """The rows of a `datasets.IterableDataset`; mappings come out as `NumberedSample`, counted as they come.

    Several processes each read the whole stream and take their own rows (accelerate's `IterableDatasetShard`, as for
    any stream of torch). A `datasets.IterableDataset` of several shards it would deal out shard by shard instead, which
    are not of one length: a process would end its epoch before the others, and wait for them where they do not come.

    Args:
        rows: the stream.
        numbered: whether mappings are numbered. Where several workers of a dataloader read shards of their own, none
            of them can count, and nothing is numbered.
    """

    def __init__(self, rows: datasets.IterableDataset, numbered: bool = True) -> None:
        self.rows = rows
        self.numbered = numbered

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        whole = worker is None or worker.num_workers == 1 or self.rows.num_shards == 1
        for number, sample in enumerate(self.rows):
            yield NumberedSample(sample, number) if self.numbered and whole and isinstance(sample, dict) else sample

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as of another epoch, where the stream is shuffled."""
        self.rows.set_epoch(epoch)


def training_rows(dataset: Any, name: str, *, numbered: bool = True) -> Any:
    """Return what a trainer iterates over: rows of anything with a length, or of a stream.

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
        return StreamedRows(undecoded(dataset), numbered)
    if isinstance(dataset, IterableDataset):
        return dataset
    if isinstance(dataset, str | dict) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"{name} is a {type(dataset).__name__}; pass a list of samples, a dataset with a length, or an "
            "IterableDataset of datasets or torch."
        )
    if len(dataset) == 0:
        raise ConfigError(f"{name} is empty; pass at least one sample.")
    if isinstance(dataset, datasets.Dataset):
        dataset = undecoded(dataset)
    return NumberedRows(dataset) if numbered and not isinstance(dataset, NumberedRows) else dataset


def undecoded(dataset: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset | datasets.IterableDataset:
    """Return the dataset with its images left encoded, as bytes and path."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset if dataset.features is None else dataset.decode(False)
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
