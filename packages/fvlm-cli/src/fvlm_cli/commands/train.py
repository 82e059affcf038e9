"""`fvlm train`: fine-tune as a YAML file says."""

from __future__ import annotations

import json
import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvlm_cli.exits import Exit
from fvlm_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console


def _print_schema(asked: bool) -> None:
    if asked:
        from fvlm_cli.config.schema import TrainConfig

        print(json.dumps(TrainConfig.model_json_schema(), indent=2))
        raise typer.Exit(Exit.OK)


_CONFIG = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="What to train, and how.")]
_SETTINGS = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE | --KEY VALUE]...", help="Keys that replace the config's.")
]
_RESUME = Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")]
_NPROC = Annotated[int, typer.Option("--nproc", min=1, metavar="N", help="Train in N processes, each on its own GPU.")]
_SCHEMA = Annotated[
    bool,
    typer.Option(
        "--schema", is_eager=True, callback=_print_schema, help="Print the config's JSON Schema, every key explained."
    ),
]


def train(
    config: _CONFIG,
    settings: _SETTINGS = None,
    resume: _RESUME = False,
    nproc: _NPROC = 1,
    schema: _SCHEMA = False,
    *,
    out: Output,
) -> None:
    """Fine-tune a vision-language model as a YAML file says.

    Settings on the command line replace the file's: lora.r=32 or --lora.r 32. Ctrl-C saves a checkpoint, from which
    --resume goes on.
    """
    from fvlm_cli.config.read import read_config
    from fvlm_cli.training.launch import launch, leave_others
    from fvlm_cli.training.run import run

    checked = read_config(config, settings or [])
    if nproc > 1:
        flags = {"--resume": resume, "--debug": out.debug, "--quiet": out.quiet, "--json": out.json}
        words = ["train", config, *(settings or []), *(flag for flag, given in flags.items() if given)]
        raise typer.Exit(launch(nproc, words, out))
    out.keep_stdout()
    record = run(checked, out, resume=resume)
    leave_others()
    out.result(record, lambda console: _show(console, record, [config, *(settings or [])]))
    if record["status"] == "interrupted":
        raise typer.Exit(Exit.INTERRUPTED)


def _show(console: Console, record: dict[str, Any], words: list[str]) -> None:
    if record["status"] == "interrupted":
        processes = os.environ.get("WORLD_SIZE", "1")  # set by whoever started several
        again = shlex.join(["fvlm", "train", *words, *(["--nproc", processes] if processes != "1" else []), "--resume"])
        console.print(f"stopped at step {record['steps']}; go on with: {again}", markup=False)
        return
    for name in ("train_loss", "eval_loss"):
        if record[name] is not None:
            console.print(f"{name:<12} {record[name]:.4f}")
    for name in ("answers_before", "answers_after"):
        if name in record:
            console.print(f"{name:<14} " + ", ".join(f"{key} {value:.4f}" for key, value in record[name].items()))
    for name in ("adapter_dir", "model_dir", "merged_dir"):
        if record.get(name) is not None:
            console.print(f"{name:<12} {record[name]}", markup=False)
    console.print(f"{'report':<12} fvlm report {record['output_dir']}", markup=False)
