"""`fvlm preview`: what the model will see and which tokens are trained, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fvlm_cli.commands.places import check_file
from fvlm_cli.exits import Exit
from fvlm_cli.output import Output

_CONFIG = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="A training config.")]
_SETTINGS = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE | --KEY VALUE]...", help="Keys that replace the config's.")
]
_ROWS = Annotated[int, typer.Option("-n", "--rows", min=0, help="How many of the first rows are shown in full.")]
_CHECK = Annotated[int, typer.Option(min=0, help="How many rows are put through the collator; 0: all of them.")]
_HTML = Annotated[Path | None, typer.Option(help="Also write a page, with the images as the model gets them.")]


def preview(
    config: _CONFIG,
    settings: _SETTINGS = None,
    rows: _ROWS = 5,
    check: _CHECK = 500,
    html: _HTML = None,
    *,
    out: Output,
) -> None:
    """Show what training will see: tokens that are trained, masked and media, images, lengths, rows left out.

    Needs the model's config and processor, not its weights. The exit code is 3 where rows cannot be used, which
    `fvlm train` would refuse.
    """
    from fvlm_cli.config.read import read_config
    from fvlm_cli.generate.load import quiet_libraries
    from fvlm_cli.preview.look import look
    from fvlm_cli.preview.record import as_data
    from fvlm_cli.preview.terminal import show

    if html is not None:
        check_file("--html", html)
    quiet_libraries(out.debug)
    read = read_config(config, settings or [])
    found = look(read, out, show=rows, check=check)
    data = as_data(found)
    if html is not None:
        from fvlm_cli.report.preview import write_preview_page

        write_preview_page(html, found, config, read.model.name)
        data["html"] = str(html)
        out.note(f"wrote {html}")
    out.result(data, lambda console: show(console, found))
    if found.refused:
        raise typer.Exit(Exit.DATA)
