"""Progress bars with rate and time left, on stderr where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from fvlm_cli.output import Output

Item = TypeVar("Item")


def clock_time(seconds: float) -> str:
    """Return hours, minutes and seconds as `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def rate(speed: float) -> str:
    """Return units a second, of slow ones the seconds that each takes."""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class _Figures(ProgressColumn):
    """How many are done, how fast, how long it still takes, and the task's note: what a narrow terminal shows first.

    The rate is the mean since the task began: batches are done all at once, and say nothing of their rows one by one.
    """

    def render(self, task: Task) -> Text:
        done, total, elapsed = task.completed, task.total or 0, task.finished_time or task.elapsed or 0.0
        here = done - task.fields["begun"]
        parts = [f"{int(done)}/{int(total)}"]
        if here > 0 and elapsed > 0:
            left = f"{clock_time(elapsed / here * (total - done))} left"
            parts += [rate(here / elapsed), f"in {clock_time(elapsed)}" if task.finished else left]
        return Text(f"{', '.join(parts)} {task.fields['note']}".rstrip())


def progress_bar(out: Output) -> Progress:
    """Return bars; they draw nothing where `out` is not interactive.

    Their tasks have two fields: `note`, and `begun`, how many were done before.
    """
    whole = {"no_wrap": True, "overflow": "ellipsis"}  # where columns are few, the bar gives way first
    columns = (
        TextColumn("{task.description}", table_column=Column(**whole)),  # type: ignore[arg-type]
        BarColumn(bar_width=24),
        _Figures(table_column=Column(**whole)),  # type: ignore[arg-type]
    )
    return Progress(*columns, console=out.stderr, disable=not out.interactive)


def track(out: Output, rows: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Pass rows on while a bar shows how many."""
    with progress_bar(out) as bar:
        task = bar.add_task(what, total=total, note="", begun=0)
        for row in rows:
            yield row
            bar.advance(task)
