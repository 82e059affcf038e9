"""Pushing a result to the Hub: made here, proved here, then shown there in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fvlm_export.build import Options
from fvlm_export.hub import HubRepo
from fvlm_export.plan import parse_size
from fvlm_export.record import FILE, Training, check_files, read_report
from fvlm_export.save import Job, parse_dtype
from fvlm_export.work_folder import LOCK, SCRATCH, WorkFolder


def push_to_hub_merged(
    model_or_adapter_dir: Any,
    repo_id: str,
    processor: Any = None,
    save_method: str = "merged_16bit",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    max_shard_size: str | int = "5GB",
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    progress: bool = True,
    adapters: Mapping[str, float] | None = None,
    trust_remote_code: bool = False,
    data: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    working_dir: str | os.PathLike[str] | None = None,
    delete_uploaded: bool = False,
) -> str:
    """Save a model as :func:`fvlm_export.save_pretrained_merged` does, and push the result to the Hub.

    A folder that :func:`fvlm_export.save_pretrained_merged` made with the same method is sent as it is, after its
    files' hashes have been compared with its record. Weights of an earlier push that would be loaded instead of the
    new ones are removed in the same commit, and so is an adapter's config, which would be applied on top of merged
    weights.

    Args:
        model_or_adapter_dir: see :func:`fvlm_export.save_pretrained_merged`, as for all that is not said here.
        repo_id: ``user/name``; made if it does not exist.
        processor: pushed along.
        save_method: ``"merged_16bit"``, ``"merged_4bit"`` or ``"lora"``.
        token: with write permission; None: the one of ``hf auth login``. It is never stored or shown.
        private: whether a new repository is private; None: the account's default.
        revision: the branch, made if it does not exist; None: the default branch.
        commit_message: None: one that names the method.
        create_pr: open a pull request instead of committing.
        max_shard_size: of one file.
        base: what to merge onto.
        dtype: of all floating-point weights.
        verify: prove the result before anything of it is committed.
        progress: show progress bars.
        adapters: which adapters, with their weights.
        trust_remote_code: allow a base to bring its own model class, when merging from folders.
        data: what it was trained on, for the model card: ids of Hub datasets, or any names. Empty: what is noted beside
            the adapter.
        metrics: metric → value, for the model card; None: what is noted beside the adapter.
        working_dir: where the result is built before it is sent; None: the system's temporary folder.
        delete_uploaded: send each shard as soon as it is proved and delete it here, so that the disk never holds more
            than one; the last proof, a reload of the whole, is then left out.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        ConfigError: an argument cannot be used.
        CheckpointError: the adapter or the base is missing, torn, or they do not fit each other.
        ExportError: the result could not be made, or the Hub refused it; nothing was committed.
    """
    job = Job(model_or_adapter_dir, processor, save_method, base, adapters, token, trust_remote_code)
    training = Training(data, metrics or {})
    options = Options(save_method, parse_size(max_shard_size), parse_dtype(dtype), verify, progress, training)
    repo = HubRepo(repo_id, token=token, revision=revision, create_pr=create_pr)
    repo.open(private)
    message = commit_message or f"Upload model with fvlm-export ({save_method})"
    if _is_finished(
        model_or_adapter_dir,
        options,
        processor=processor,
        base=base,
        adapters=adapters,
        metrics=metrics,
        data=data or None,
    ):
        finished = Path(model_or_adapter_dir).expanduser()
        check_files(finished)
        return _send(repo, finished, message, save_method)
    parent = None if working_dir is None else Path(working_dir).expanduser()
    with tempfile.TemporaryDirectory(prefix="fvlm-push-", dir=parent) as staging:
        name = repo.repo_id.rsplit("/", 1)[-1]
        with WorkFolder(Path(staging) / name, overwrite=False, resumable=False) as work:
            job.run(work, name, options, repo.add if delete_uploaded else None)
            return _send(repo, work.path, message, save_method)


def _send(repo: HubRepo, folder: Path, message: str, save_method: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != LOCK and SCRATCH not in path.parts:
            repo.add(path, path.relative_to(folder).as_posix())
    return repo.commit(message, adapter=save_method == "lora")


def _is_finished(model: Any, options: Options, **asked: Any) -> bool:
    """Whether a folder is already what would be made of it, by its own record; then it is sent as it is."""
    if not isinstance(model, (str, os.PathLike)) or not (Path(model).expanduser() / FILE).is_file():
        return False
    same = read_report(Path(model).expanduser()).save_method == options.save_method
    return same and options.dtype is None and all(value is None for value in asked.values())
