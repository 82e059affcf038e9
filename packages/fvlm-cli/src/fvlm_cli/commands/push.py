"""`fvlm push`: an adapter or a merged model → the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fvlm_cli.commands.merge import Method
from fvlm_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

_FOLDER = Annotated[str, typer.Argument(help="The folder of an adapter, or of a merged model.")]
_REPO = Annotated[str, typer.Argument(help="user/name")]
_METHOD = Annotated[
    Method, typer.Option(help="merged_16bit; merged_4bit (bitsandbytes NF4); lora (the adapter itself).")
]
_PRIVATE = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Who may see a repository that is made. Default: the account's."),
]


def push(
    folder: _FOLDER,
    repo_id: _REPO,
    save_method: _METHOD = "merged_16bit",
    private: _PRIVATE = None,
    *,
    out: Output,
) -> None:
    """Merge if need be, and upload to the Hub.

    The token comes from HF_TOKEN in the environment or from `hf auth login`; there is no option for it, since other
    users of a machine can read command lines.
    """
    from fvlm_core.checkpoint import find_source
    from fvlm_export import push_to_hub_merged

    find_source(folder)  # before the Hub is asked anything
    address = push_to_hub_merged(folder, repo_id, save_method=save_method, private=private)

    def show(console: Console) -> None:
        console.print(f"pushed to {address}", markup=False)

    out.result({"url": address, "repo_id": repo_id, "save_method": save_method}, show)
