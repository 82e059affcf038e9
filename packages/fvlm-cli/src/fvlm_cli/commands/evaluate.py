"""`fvlm eval`: how good a model's answers to evaluation data are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvlm_cli.commands import asking
from fvlm_cli.commands.places import check_parents
from fvlm_cli.generate.load import Precision
from fvlm_cli.output import Output
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fvlm_cli.config.schema import TrainConfig
    from fvlm_cli.data.row import Row

_CONFIG = Annotated[
    str, typer.Argument(metavar="CONFIG.yaml", help="A training config: its evaluation data and its eval section.")
]
_SETTINGS = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE | --KEY VALUE]...", help="Keys that replace the config's.")
]
_OUTPUT = Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder for answers and metrics.")]
_PRECISION = Annotated[
    Precision | None,
    typer.Option(help="Of the weights. Default: an adapter's base as model.precision says, a model as it is stored."),
]


def evaluate(
    model: asking.MODEL,
    config: _CONFIG,
    settings: _SETTINGS = None,
    output: _OUTPUT = Path("fvlm-eval"),
    precision: _PRECISION = None,
    *,
    out: Output,
) -> None:
    """Let a model answer a config's evaluation rows, and compare: loss, exact match, error rates, ANLS.

    The rows are those of data.eval, or those that data.eval_fraction sets aside. --output gets predictions.jsonl, a
    line a row with its own metrics, and metrics.json.
    """
    from fvlm_cli.config.read import read_config

    read = read_config(config, settings or [])
    if read.data.eval is None and read.data.eval_fraction is None:
        raise ConfigError(f"{config} has nothing to evaluate on; give data.eval or data.eval_fraction.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"--output {output} is not a new or empty folder; name another.")
    check_parents("--output", output)
    from fvlm_cli.bars import track
    from fvlm_cli.data.read import read_data

    _, rows = read_data(read.data, read.train.seed, lambda all_rows, n: track(out, all_rows, n, "checking rows"))
    found = _evaluate(model, read, rows[: read.eval.rows], output, precision, out)
    found = {"model": model, "config": config, **found, "output": str(output)}
    (output / "metrics.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    out.result(found, lambda console: _show(console, found))


def _evaluate(
    model: str, config: TrainConfig, rows: list[Row], output: Path, precision: Precision | None, out: Output
) -> dict[str, Any]:
    from fvlm_cli.bars import track
    from fvlm_cli.evaluation.loss import mean_loss
    from fvlm_cli.evaluation.rows import answer_rows
    from fvlm_cli.generate.answer import Decoding
    from fvlm_cli.generate.load import is_adapter, load_to_answer, quiet_libraries
    from fvlm_cli.training.collate import build_answerer, build_collator

    section = config.model
    if precision is None and section.precision != "full" and is_adapter(model):
        precision = section.precision or "4bit"
    quiet_libraries(out.debug)
    out.note(f"loading {model}")
    loaded, processor = load_to_answer(
        model,
        precision,
        trust_remote_code=section.trust_remote_code,
        max_seq_length=section.max_seq_length,
        dtype=section.dtype,
        token=section.token,
        device_map=section.device_map,
    )
    started = time.monotonic()
    collator = build_collator(config.data, loaded, processor)
    loss = mean_loss(loaded, collator, track(out, rows, len(rows), "loss"))
    answerer = build_answerer(config.data, loaded, processor, Decoding(config.eval.max_new_tokens))
    metrics = answer_rows(answerer, rows, config.eval, output / "predictions.jsonl", out)
    return {"rows": len(rows), "loss": loss, **metrics, "seconds": round(time.monotonic() - started, 3)}


def _show(console: Console, found: dict[str, Any]) -> None:
    for name, value in found.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        console.print(f"{name:<12} {shown}", markup=False)
