"""The `data` section of a config → checked rows, ready for the collator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fvlm_cli.config.nearest import hint
from fvlm_cli.config.schema import DataSection
from fvlm_cli.data.files import read_file
from fvlm_cli.data.folder import read_folder
from fvlm_cli.data.images import check_images, resolve_images
from fvlm_cli.data.row import Row
from fvlm_core.errors import ConfigError, DataError

NAMES = ("messages", "conversations", "prompt", "completion", "images", "image", "videos", "video")
"""The columns that FVLM knows; see `fvlm_vision.samples`."""

Track = Callable[[Iterable[Row], int], Iterable[Row]]


def read_data(
    data: DataSection, seed: int, track: Track, refused: list[DataError] | None = None
) -> tuple[list[Row], list[Row]]:
    """Read and check everything that a run trains and evaluates on.

    Args:
        data: the config's section.
        seed: chooses the rows that `eval_fraction` sets aside.
        track: passes rows on while it shows progress; it is given their number.
        refused: given, it takes the errors of rows that cannot be used, which are then left out; None: the first such
            row is an error. A file that is damaged as a whole is one either way.

    Returns:
        The rows to train on, and those to evaluate on (none where none are asked for).

    Raises:
        ConfigError: `columns` names what FVLM does not know.
        DataError: a file, folder, row or image cannot be used; the message says where.
    """
    for name in data.columns:
        if name not in NAMES:
            raise ConfigError(f"data.columns: {name} is no column that FVLM knows; {hint(name, NAMES)}")
    train = _read(data, data.train, track, refused)
    if data.eval is not None:
        return train, _read(data, data.eval, track, refused)
    return _split(train, data.eval_fraction, seed) if data.eval_fraction is not None else (train, [])


def _read(data: DataSection, sources: str | list[str], track: Track, refused: list[DataError] | None) -> list[Row]:
    rows: list[tuple[Row, Path | None]] = []
    for source in [sources] if isinstance(sources, str) else sources:
        rows.extend(_source(data, Path(source).expanduser()))
    rows = rows[: data.limit]
    checked: list[Row] = []
    folders = [folder for _, folder in rows]
    for row, folder in zip(track([row for row, _ in rows], len(rows)), folders, strict=True):
        try:
            checked.append(_checked(row, folder, data.columns))
        except DataError as error:
            if refused is None:
                raise
            refused.append(error)
    return checked


def _source(data: DataSection, path: Path) -> Iterator[tuple[Row, Path | None]]:
    """Yield rows with the folder that their images start at; None where that is settled already."""
    if path.is_dir():
        for row in read_folder(path, data.caption_prompt):
            yield row, None
        return
    folder = Path(data.image_folder).expanduser() if data.image_folder is not None else path.parent
    for row in read_file(path):
        yield row, folder


def _checked(row: Row, folder: Path | None, columns: dict[str, str]) -> Row:
    if folder is not None:
        row = Row(resolve_images(_rename(row, columns), folder), row.place)
    _check(row)
    return row


def _rename(row: Row, columns: dict[str, str]) -> dict[str, Any]:
    sample = dict(row.sample)
    for name, theirs in columns.items():
        if theirs not in row.sample:
            raise row.refuse(f"it has no column {theirs}, which data.columns names; {hint(theirs, row.sample)}")
        sample[name] = row.sample[theirs]
    return {name: value for name, value in sample.items() if name in columns or name not in columns.values()}


def _check(row: Row) -> None:
    from fvlm_vision.samples import read_sample

    try:
        conversation = read_sample(row.sample)
    except DataError as error:
        raise row.refuse(error.reason) from None
    check_images(row, conversation.images)


def _split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Set a share of the rows aside, at least one, in the order that they had."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise DataError(f"data.eval_fraction={fraction} of {len(rows)} rows leaves none to train on; give more rows.")
    aside = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for number, row in enumerate(rows) if number not in aside],
        [row for number, row in enumerate(rows) if number in aside],
    )
