"""A dataset on the Hub → rows, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvlm_cli.config.schema import SourceSection
from fvlm_cli.data.row import Row
from fvlm_core.errors import DataError


def iterate_hub(section: SourceSection, streaming: bool) -> Iterator[Row]:
    """Yield the rows of a dataset on the Hub; its images stay encoded. `HF_TOKEN` is used where it is set.

    Args:
        section: with its id, split, subset and revision.
        streaming: read it from the Hub as it is needed, instead of downloading it first.

    Raises:
        DataError: it cannot be had.
    """
    dataset = _load(section, streaming)
    name = f"{section.path} on the Hub, {section.split}"
    number = -1
    try:
        for number, sample in enumerate(dataset):
            yield Row(dict(sample), f"{name}, row {number}")
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: it cannot be read beyond row {number} ({_reason(error)}).") from error
    if number < 0:
        raise DataError(f"{name}: it holds no rows; name another split.")


def _load(section: SourceSection, streaming: bool) -> Any:
    import datasets

    from fvlm_vision.rows import undecoded

    datasets.disable_progress_bars()  # the rows are counted as they are checked
    try:
        dataset = datasets.load_dataset(
            section.path, section.subset, split=section.split, revision=section.revision, streaming=streaming
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{section.path} is no file or folder here, and no dataset of that id can be had from the Hub "
            f"({_reason(error)}); check the path, the id with its split and subset, and the network."
        ) from error
    return undecoded(dataset)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
