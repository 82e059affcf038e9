"""`fvlm init`: a commented config to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fvlm_cli.commands.places import check_file
from fvlm_cli.output import Output
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "pixtral", "mistral3", "gemma3"]
Format = Literal["messages", "sharegpt", "prompt", "csv", "parquet", "folder", "mix", "stream"]

_PATH = Annotated[Path, typer.Argument(metavar="[CONFIG.yaml]", help="The file to write; it must not exist.")]
_FAMILY = Annotated[
    Family | None, typer.Option(help="The model's family. Default: that of --model, else qwen2_vl.", show_default=False)
]
_DATA = Annotated[
    Format,
    typer.Option(
        help="messages, sharegpt (LLaVA), prompt (question and answer), csv, parquet, folder (images with captions), "
        "mix (several datasets with weights), or stream (read as needed)."
    ),
]
_MODEL = Annotated[str | None, typer.Option(help="Folder or Hub id, instead of the family's usual checkpoint.")]
_TRAIN = Annotated[str | None, typer.Option(help="The data file or folder.")]


def init(
    path: _PATH = Path("config.yaml"),
    family: _FAMILY = None,
    data: _DATA = "messages",
    model: _MODEL = None,
    train: _TRAIN = None,
    *,
    out: Output,
) -> None:
    """Write a config in which every key is explained, for a model family and a data format."""
    from fvlm_cli.config.write import start_config

    check_file("CONFIG.yaml", path)
    if path.exists():
        raise ConfigError(f"{path} exists already; name another file, or remove it.")
    known: str | None = family
    if family is None:
        known = "qwen2_vl" if model is None else _family_of(model)
        if known is None:
            out.note(f"{model} is of a family without a start of its own: whole conversations are trained")
    text = start_config(known, data, model, train)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

    def show(console: Console) -> None:
        console.print(f"wrote {path}; next: fvlm preview {path}", markup=False)

    out.result({"config": str(path), "family": known, "data": data}, show)


def _family_of(model: str) -> str | None:
    """Return the family that a checkpoint's config says it is of, None for one without a start."""
    from fvlm_cli.config.starts import FAMILIES
    from fvlm_cli.inspection.opened import open_model

    facts = open_model(model).facts
    name = facts.vision_type if facts.model_type == "llava" else facts.model_type
    return name if name in FAMILIES else None
