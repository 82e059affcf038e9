"""The `data` section of a config → checked rows, ready for the collator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from fvlm_cli.config.schema import DataSection
from fvlm_cli.data.mix import counts, mixed
from fvlm_cli.data.row import Row
from fvlm_cli.data.sources import Source, Unchecked, sources_of
from fvlm_core.errors import DataError

Track = Callable[[Iterable[Unchecked], int], Iterable[Unchecked]]


def read_data(
    data: DataSection,
    seed: int,
    track: Track,
    refused: list[DataError] | None = None,
    *,
    streamed: int | None = 0,
) -> tuple[list[Row], list[Row]]:
    """Read and check everything that a run trains and evaluates on.

    Args:
        data: the config's section.
        seed: chooses the rows that `eval_fraction` sets aside, and those that weights repeat or leave out.
        track: passes rows on while it shows progress; it is given their number.
        refused: given, it takes the errors of rows that cannot be used, which are then left out; None: the first such
            row is an error. A file that is damaged as a whole is one either way.
        streamed: with `data.streaming`, how many rows to read of those that are trained on, in the order of the files;
            None: all of them.

    Returns:
        The rows to train on, and those to evaluate on (none where none are asked for).

    Raises:
        ConfigError: `columns` names what FVLM does not know.
        DataError: a file, folder, row or image cannot be used; the message says where.
    """
    sources = sources_of(data, data.train, "data.train")
    aside = [] if data.eval is None else sources_of(data, data.eval, "data.eval")
    reader = _Reader(track, refused)
    if data.streaming:
        train = [] if streamed == 0 else reader.stream(data, seed, streamed)
        return train, reader.joined(aside, data.limit)
    if sources[0].weight is None:
        train = reader.joined(sources, data.limit)
        if data.eval_fraction is None:
            return train, reader.joined(aside, data.limit)
        chosen = _aside(len(train), data.eval_fraction, seed)
        return _without(train, chosen), [train[number] for number in sorted(chosen)]
    parts = reader.parts(sources)
    evaluate = reader.joined(aside, data.limit)
    if data.eval_fraction is not None:  # before rows are repeated, so that none is on both sides
        chosen_of = [_aside(len(part), data.eval_fraction, seed) for part in parts]
        evaluate = [part[number] for part, chosen in zip(parts, chosen_of, strict=True) for number in sorted(chosen)]
        parts = [_without(part, chosen) for part, chosen in zip(parts, chosen_of, strict=True)]
    weights = [source.weight or 0.0 for source in sources]
    wanted = counts([len(part) for part in parts], weights, data.mixing, data.limit)
    return mixed(parts, wanted, seed), evaluate


class _Reader:
    """Reads and checks rows.

    Args:
        track, refused: as in `read_data`.
    """

    def __init__(self, track: Track, refused: list[DataError] | None) -> None:
        self._track = track
        self._refused = refused

    def joined(self, sources: Sequence[Source], limit: int | None) -> list[Row]:
        """Return the rows of datasets, one after another."""
        return self._checked(islice((row for source in sources for row in source.rows()), limit))

    def parts(self, sources: Sequence[Source]) -> list[list[Row]]:
        """Return the rows of each dataset.

        Raises:
            DataError: none of a dataset's rows can be used.
        """
        parts = [self._checked(source.rows()) for source in sources]
        for source, part in zip(sources, parts, strict=True):
            if not part:
                raise DataError(f"{source.section.path}: none of its rows can be used; leave it out.")
        return parts

    def stream(self, data: DataSection, seed: int, most: int | None) -> list[Row]:
        """Return the first rows of a stream."""
        from fvlm_cli.data.stream import RowStream

        return self._checked(islice(RowStream(data, seed).rows(), most))

    def _checked(self, rows: Iterable[Unchecked]) -> list[Row]:
        found: list[Row] = []
        read = list(rows)
        for row in self._track(read, len(read)):
            try:
                found.append(row.checked())
            except DataError as error:
                if self._refused is None:
                    raise
                self._refused.append(error)
        return found


def _aside(count: int, fraction: float, seed: int) -> set[int]:
    """Choose a share of the row numbers, at least one."""
    chosen = max(1, round(count * fraction))
    if chosen >= count:
        raise DataError(f"data.eval_fraction={fraction} of {count} rows leaves none to train on; give more rows.")
    return set(random.Random(seed).sample(range(count), chosen))


def _without(rows: list[Row], numbers: set[int]) -> list[Row]:
    return [row for number, row in enumerate(rows) if number not in numbers]
