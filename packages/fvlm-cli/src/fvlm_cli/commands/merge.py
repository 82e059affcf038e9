"""`fvlm merge`: an adapter and its base → a model that anything can serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fvlm_cli.commands import export_options as options
from fvlm_cli.commands.places import check_parents
from fvlm_cli.output import Output
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_ADAPTER = Annotated[str, typer.Argument(help="The adapter's folder.")]
_OUTPUT = Annotated[str, typer.Option("--output", "-o", help="The folder to write.")]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder, if a model is in it.")]


def merge(
    adapter: _ADAPTER,
    output: _OUTPUT,
    base: options.BASE = None,
    save_method: options.METHOD = "merged_16bit",
    dtype: options.DTYPE = None,
    max_shard_size: options.SHARD = "5GB",
    overwrite: _OVERWRITE = False,
    verify: options.VERIFY = True,
    adapters: options.ADAPTERS = None,
    processor: options.PROCESSOR = None,
    data: options.DATA = None,
    metrics: options.METRICS = None,
    trust_remote_code: options.TRUST = False,
    *,
    out: Output,
) -> None:
    """Merge an adapter into its base, check the result, and save it with processor and model card.

    HF_TOKEN in the environment opens gated bases on the Hub.
    """
    weights, measured = options.numbers("--adapter", adapters), options.numbers("--metric", metrics)
    folder = Path(output)
    check_parents("--output", folder)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"--output {output} is not empty; name another folder, or replace its model with --overwrite."
        )
    from fvlm_export import save_pretrained_merged

    written = save_pretrained_merged(
        adapter,
        output,
        options.load_processor(processor),
        save_method=save_method,
        max_shard_size=max_shard_size,
        base=base,
        dtype=dtype,
        verify=verify,
        progress=out.interactive,
        overwrite=overwrite,
        adapters=weights,
        trust_remote_code=trust_remote_code,
        data=data or (),
        metrics=measured,
    )

    def show(console: Console) -> None:
        console.print(f"merged into {written}", markup=False)

    out.result({"output_dir": str(written), "save_method": save_method}, show)
