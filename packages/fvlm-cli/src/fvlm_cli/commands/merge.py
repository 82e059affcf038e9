"""`fvlm merge`: an adapter and its base → a model that anything can serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fvlm_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

Method = Literal["merged_16bit", "merged_4bit", "lora"]

_ADAPTER = Annotated[str, typer.Argument(help="The adapter's folder.")]
_OUTPUT = Annotated[str, typer.Option("--output", "-o", help="The folder to write.")]
_BASE = Annotated[
    str | None,
    typer.Option(
        help="What to merge onto: a folder or Hub id, original, or dequantized (exactly what training saw). Default: "
        "the 16-bit weights of the base that the adapter names, dequantized if they are stored quantized."
    ),
]
_METHOD = Annotated[
    Method, typer.Option(help="merged_16bit; merged_4bit (bitsandbytes NF4); lora (the adapter itself).")
]
_DTYPE = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: as in the base.")]
_SHARD = Annotated[str, typer.Option(help="Size of one file at most.")]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
_TRUST = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a base that brings its own model code.")]


def merge(
    adapter: _ADAPTER,
    output: _OUTPUT,
    base: _BASE = None,
    save_method: _METHOD = "merged_16bit",
    dtype: _DTYPE = None,
    max_shard_size: _SHARD = "5GB",
    overwrite: _OVERWRITE = False,
    trust_remote_code: _TRUST = False,
    *,
    out: Output,
) -> None:
    """Merge an adapter into its base, check the result, and save it with processor and model card.

    HF_TOKEN in the environment opens gated bases on the Hub.
    """
    from fvlm_export import save_pretrained_merged

    written = save_pretrained_merged(
        adapter,
        output,
        save_method=save_method,
        max_shard_size=max_shard_size,
        base=base,
        dtype=dtype,
        progress=out.interactive,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )

    def show(console: Console) -> None:
        console.print(f"merged into {written}", markup=False)

    out.result({"output_dir": str(written), "save_method": save_method}, show)
