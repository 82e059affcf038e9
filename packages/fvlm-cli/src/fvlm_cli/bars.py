"""Progress bars with the time left, on stderr where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fvlm_cli.output import Output

Item = TypeVar("Item")


def progress_bar(out: Output) -> Progress:
    """Return bars whose tasks have a field `note`; they draw nothing where `out` is not interactive."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=out.stderr, disable=not out.interactive)


def track(out: Output, rows: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Pass rows on while a bar shows how many."""
    with progress_bar(out) as bar:
        task = bar.add_task(what, total=total, note="")
        for row in rows:
            yield row
            bar.advance(task)
