"""How far a run is: a bar with the time left on a terminal, one line a task elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class ProgressWatcher:
    """Draws one bar a task, with the time left of the current one and the time taken by the others; a context manager.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(  # fits 80 columns
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[state]} {task.fields[note]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressWatcher:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=self._progress.tasks[self._task].total, state="")

    def begin(self, task: str, total: int) -> None:
        """Finish the task before and start one of ``total`` units."""
        self._finish()
        self._task = self._progress.add_task(task, total=total, note="", state="left")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Advance the current task."""
        if self._task is not None:
            self._progress.update(self._task, advance=units, note=note)

    def refresh(self) -> None:
        """Draw now what is otherwise drawn within a tenth of a second."""
        self._progress.refresh()


class LineWatcher:
    """Writes one line when a task starts, and one at each quarter of a long one.

    Args:
        write: takes a line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._task, self._total, self._done = "", 1, 0

    def begin(self, task: str, total: int) -> None:
        """Announce a task of ``total`` units."""
        self._task, self._total, self._done = task, total, 0
        self._write(f"{task} …")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count ``units``, and say so when they complete a quarter of a task of 20 units or more."""
        quarter = 4 * self._done // self._total
        self._done += units
        if self._total >= 20 and quarter < 4 * self._done // self._total < 4:
            self._write(f"  {self._done} of {self._total} {note}".rstrip())
