"""`data.streaming`: rows that are read as training needs them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from fvlm_cli.config.schema import DataSection
from fvlm_cli.data.mix import interleaved, shuffled
from fvlm_cli.data.sources import Unchecked, sources_of
from fvlm_vision.rows import PlacedSample


class RowStream(IterableDataset[Any]):
    """The samples of `data.train`, in an order that follows from the seed, the epoch and the number of workers alone.

    Datasets without weights come one after another, those with weights are drawn by them. Each row is then drawn from
    the next `data.shuffle_buffer` ones. Every dataloader worker reads all of the rows and keeps its share of them,
    which it checks and decodes.

    Args:
        data: the config's section.
        seed: of the order.

    Raises:
        ConfigError: the columns of a dataset name what FVLM does not know.
    """

    def __init__(self, data: DataSection, seed: int) -> None:
        self._data = data
        self._seed = seed
        self._epoch = 0
        self._sources = sources_of(data, data.train, "data.train")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass is of; the trainer calls it."""
        self._epoch = epoch

    def rows(self) -> Iterator[Unchecked]:
        """Yield the rows of the epoch before they are shuffled and checked.

        Raises:
            DataError: a file, folder or dataset cannot be read.
        """
        starts = [partial(source.rows, streaming=True) for source in self._sources]
        weights = [source.weight for source in self._sources if source.weight is not None]
        if weights:
            rows = interleaved(starts, weights, self._data.mixing, f"{self._seed}-{self._epoch}-mix")
        else:
            rows = chain.from_iterable(start() for start in starts)
        return islice(rows, self._data.limit)

    def __iter__(self) -> Iterator[PlacedSample]:
        """Yield the samples of the epoch.

        Raises:
            DataError: a row cannot be used; the message says where it stands.
        """
        worker = get_worker_info()
        rows = self.rows()
        if worker is not None:
            rows = islice(rows, worker.id, None, worker.num_workers)
        seed = f"{self._seed}-{self._epoch}-{0 if worker is None else worker.id}"
        for row in shuffled(rows, self._data.shuffle_buffer, seed):
            found = row.checked()
            yield PlacedSample(found.sample, found.place)
