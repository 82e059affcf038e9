"""`fvlm report`: a run as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fvlm_cli.commands.places import check_file
from fvlm_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

_RUN = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output_dir of fvlm train.")]
_COMPARE = Annotated[Path | None, typer.Option(metavar="RUN2_DIR", help="Another run to set beside it.")]
_OUTPUT = Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file. Default: report.html in RUN_DIR.")]
_MOST = Annotated[int, typer.Option(min=0, help="How many evaluation rows are shown at most, the worst first.")]


def report(run: _RUN, compare: _COMPARE = None, output: _OUTPUT = None, rows: _MOST = 200, *, out: Output) -> None:
    """Write a run as one HTML file: config, curves, metrics, and evaluation images with answers before and after.

    The page needs no other file and no network. Answers are there for runs with eval.rows in their config.
    """
    from fvlm_cli.report.gathered import gather
    from fvlm_cli.report.run import write_run_report

    path = output or run / "report.html"
    check_file("--output", path)
    gathered = gather(run)
    other = None if compare is None else gather(compare)
    shown = write_run_report(path, gathered, other, rows)

    def show(console: Console) -> None:
        console.print(f"wrote {path}", markup=False)

    out.result({"report": str(path), "rows": shown}, show)
