"""Options that the verbs which let a model answer share."""

from __future__ import annotations

from typing import Annotated

import typer

from fvlm_cli.generate.load import Precision

MODEL = Annotated[str, typer.Argument(help="Folder or Hub id of a model, or of an adapter.")]
PRECISION = Annotated[
    Precision | None, typer.Option(help="Of the weights: 4bit, 8bit or 16bit. Default: as they are stored.")
]
MAX_NEW_TOKENS = Annotated[int, typer.Option(min=1, max=1_000_000, help="The longest answer, in tokens.")]
TEMPERATURE = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token; above: tokens are drawn.")]
TOP_P = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that make up this share.")]
SEED = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the drawing.")]
RESIZE = Annotated[
    int | None,
    typer.Option(min=1, max=100_000, help="Bring the longer side of images down to this many pixels, as data.resize."),
]
SYSTEM = Annotated[str | None, typer.Option(help="What the model is told first.")]
TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings along.")]
