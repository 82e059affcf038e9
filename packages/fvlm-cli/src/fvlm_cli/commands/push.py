"""`fvlm push`: an adapter or a merged model → the Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fvlm_cli.commands import export_options as options
from fvlm_cli.output import Output

if TYPE_CHECKING:
    from rich.console import Console

_FOLDER = Annotated[str, typer.Argument(help="The folder of an adapter, or of a merged model.")]
_REPO = Annotated[str, typer.Argument(help="user/name")]
_PRIVATE = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Who may see a repository that is made. Default: the account's."),
]
_REVISION = Annotated[str | None, typer.Option(help="The branch, made if need be. Default: the repository's.")]
_MESSAGE = Annotated[str | None, typer.Option(help="The commit's. Default: one that names the method.")]
_PR = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")]
_WORKING = Annotated[str | None, typer.Option(help="Where the result is built. Default: the temporary folder.")]
_DELETE = Annotated[
    bool, typer.Option("--delete-uploaded", help="Send and delete each shard as it is proved, for small disks.")
]


def push(
    folder: _FOLDER,
    repo_id: _REPO,
    save_method: options.METHOD = "merged_16bit",
    private: _PRIVATE = None,
    revision: _REVISION = None,
    commit_message: _MESSAGE = None,
    create_pr: _PR = False,
    base: options.BASE = None,
    dtype: options.DTYPE = None,
    max_shard_size: options.SHARD = "5GB",
    verify: options.VERIFY = True,
    adapters: options.ADAPTERS = None,
    processor: options.PROCESSOR = None,
    data: options.DATA = None,
    metrics: options.METRICS = None,
    working_dir: _WORKING = None,
    delete_uploaded: _DELETE = False,
    trust_remote_code: options.TRUST = False,
    *,
    out: Output,
) -> None:
    """Merge if need be, and upload to the Hub.

    The token comes from HF_TOKEN in the environment or from `hf auth login`; there is no option for it, since other
    users of a machine can read command lines.
    """
    weights, measured = options.numbers("--adapter", adapters), options.numbers("--metric", metrics)
    from fvlm_core.checkpoint import find_source
    from fvlm_export import push_to_hub_merged

    find_source(folder)  # before the Hub is asked anything
    address = push_to_hub_merged(
        folder,
        repo_id,
        options.load_processor(processor),
        save_method=save_method,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        max_shard_size=max_shard_size,
        base=base,
        dtype=dtype,
        verify=verify,
        progress=out.interactive,
        adapters=weights,
        trust_remote_code=trust_remote_code,
        working_dir=working_dir,
        delete_uploaded=delete_uploaded,
        data=data or (),
        metrics=measured,
    )

    def show(console: Console) -> None:
        console.print(f"pushed to {address}", markup=False)

    out.result({"url": address, "repo_id": repo_id, "save_method": save_method}, show)
