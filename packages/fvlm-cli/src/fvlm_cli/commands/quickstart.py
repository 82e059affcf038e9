"""`fvlm quickstart`: fine-tune a tiny model on real handwriting, here and now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvlm_cli.output import Output
from fvlm_cli.quickstart import STEPS

if TYPE_CHECKING:
    from rich.console import Console

_OUTPUT = Annotated[
    Path, typer.Option(help="Folder for the results. If it holds something, a numbered folder beside it is used.")
]
_STEPS = Annotated[int, typer.Option(help="Training steps.")]
_SEED = Annotated[int, typer.Option(help="Seed of the adapter and of the training images.")]


def quickstart(
    output: _OUTPUT = Path("fvlm-quickstart"), steps: _STEPS = STEPS, seed: _SEED = 0, *, out: Output
) -> None:
    """Fine-tune a tiny vision-language model on real handwriting: no download, no GPU needed, a few minutes."""
    from dataclasses import asdict

    from fvlm_cli.quickstart.progress import LineWatcher, ProgressWatcher
    from fvlm_cli.quickstart.run import Settings, run

    settings = Settings(output=output, steps=steps, seed=seed)
    with _transformers_quiet():
        if out.interactive:
            with ProgressWatcher(out.stderr) as watcher:
                summary = run(settings, watcher)
        else:
            summary = run(settings, LineWatcher(out.note))
    data = asdict(summary)
    out.result(data, lambda console: _show(console, data))


@contextmanager
def _transformers_quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings out of our own progress."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _show(console: Console, data: dict[str, Any]) -> None:
    seconds = f"{data['train_seconds']:.0f} s / {data['total_seconds']:.0f} s on {data['device']}"
    for name, value in {
        "read exactly, before training": f"{data['accuracy_before']:.1%}",
        "read exactly, after training": f"{data['accuracy_after']:.1%}",
        "merged model reads the same": f"{data['merged_agreement']:.1%}",
        "training / total": seconds,
        "report": str(Path(data["output_dir"]) / "report.html"),
    }.items():
        console.print(f"{name:<30} {value}", markup=False)
