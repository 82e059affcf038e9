"""The options that `fvlm merge` and `fvlm push` share, and how their texts are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer

from fvlm_core.errors import ConfigError

Method = Literal["merged_16bit", "merged_4bit", "lora"]

BASE = Annotated[
    str | None,
    typer.Option(
        help="What to merge onto: a folder or Hub id, original, or dequantized (exactly what training saw). Default: "
        "the 16-bit weights of the base that the adapter names, dequantized if they are stored quantized."
    ),
]
METHOD = Annotated[
    Method, typer.Option(help="merged_16bit; merged_4bit (bitsandbytes NF4); lora (the adapter itself).")
]
DTYPE = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: as in the base.")]
SHARD = Annotated[str, typer.Option(help="Size of one file at most.")]
TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a base that brings its own model code.")]
VERIFY = Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the result before it is announced.")]
ADAPTERS = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="FOLDER=WEIGHT", help="Add another adapter, or weigh the first; may be repeated."
    ),
]
PROCESSOR = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of the processor to save along. Default: that of the adapter or its base."),
]
DATA = Annotated[
    list[str] | None,
    typer.Option(help="What it was trained on, for the model card; may be repeated. Default: the adapter's note."),
]
METRICS = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="NAME=VALUE", help="For the model card; may be repeated."),
]


def numbers(option: str, texts: Iterable[str] | None) -> dict[str, float] | None:
    """Read an option's ``NAME=NUMBER`` texts; None where there is none.

    Raises:
        ConfigError: one is not of that form.
    """
    found: dict[str, float] = {}
    for text in texts or ():
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            name = ""
        if not name or not math.isfinite(found[name]):
            raise ConfigError(f"{option} {text!r} is not of the form NAME=NUMBER; e.g. {option} name=0.5.")
    return found or None


def load_processor(name: str | None) -> Any:
    """Load a processor; None stays None.

    Raises:
        ConfigError: there is none under that name.
    """
    if name is None:
        return None
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"--processor {name!r} holds no processor ({line}); name a folder or Hub id.") from None
