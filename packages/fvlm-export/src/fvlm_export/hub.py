"""The Hub, through huggingface_hub: files gathered one by one, then one commit that makes all of them visible at once.

Large files are uploaded when they are handed over, so each may be deleted before the next is made; until the commit,
nothing of them shows in the repository. Files that the Hub already has are not sent again, so a push that was cut goes
on where it stopped. Every failure becomes one sentence; the token never appears in it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from fvlm_core.errors import ConfigError, ExportError
from fvlm_export.retry import cause_of, patiently, status_of

T = TypeVar("T")

# What an earlier push may have left, and what would be loaded instead of, or on top of, the new files
_STALE_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "adapter_*")
_STALE_ADAPTER = ("adapter_*",)


class HubRepo:
    """A model repository on the Hub that is being pushed to.

    Args:
        repo_id: ``user/name``.
        token: as huggingface_hub takes it; it is handed on and never stored elsewhere.
        revision: the branch; None: the default one.
        create_pr: open a pull request instead of committing to the branch.

    Raises:
        ConfigError: ``repo_id`` is no repository name.
    """

    def __init__(self, repo_id: str, *, token: str | bool | None, revision: str | None, create_pr: bool) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ConfigError(f"repo_id={repo_id!r} is no repository name ({error}); give 'user/name'.") from None
        self.repo_id, self.revision, self.create_pr = repo_id, revision, create_pr
        self._api = HfApi(token=token)
        self._additions: list[CommitOperationAdd] = []

    def open(self, private: bool | None) -> None:
        """Make the repository and the branch where they do not exist; ask early, before any work is done.

        Args:
            private: whether a new repository is private; None: what the account's settings say.

        Raises:
            ExportError: the token is missing or may not write there.
        """
        made = self._ask(lambda: self._api.create_repo(self.repo_id, private=private, exist_ok=True))
        self.repo_id = made.repo_id  # with the user's name, where it was left out
        if self.revision is not None and not self.create_pr:
            branch = self.revision
            self._ask(lambda: self._api.create_branch(self.repo_id, branch=branch, exist_ok=True))

    def add(self, path: Path, name: str) -> None:
        """Hand a file over; when this returns, a large one is on the Hub and may be deleted here."""
        addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
        self._ask(
            lambda: self._api.preupload_lfs_files(
                self.repo_id, [addition], revision=self.revision, create_pr=self.create_pr
            )
        )
        if not addition._is_uploaded:  # a small file travels in the commit itself
            addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=path.read_bytes())
        self._additions.append(addition)

    def commit(self, message: str, *, adapter: bool) -> str:
        """Make everything handed over visible, and remove older weights that would be loaded instead.

        Args:
            message: the commit's.
            adapter: whether an adapter is pushed, which leaves a model's weights in the repository alone.

        Returns:
            The URL of the commit or of the pull request.
        """
        new = {addition.path_in_repo for addition in self._additions}
        stale = _STALE_ADAPTER if adapter else _STALE_WEIGHTS
        there = self._ask(lambda: self._api.list_repo_files(self.repo_id, revision=self.revision))
        old = [name for name in there if name not in new and any(fnmatch.fnmatch(name, glob) for glob in stale)]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*self._additions]
        operations += [CommitOperationDelete(path_in_repo=name) for name in old]
        info = self._ask(
            lambda: self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
            )
        )
        return str(info.pr_url if self.create_pr and info.pr_url else info.commit_url)

    def _ask(self, request: Callable[[], T]) -> T:
        errors = (HfHubHTTPError, httpx.HTTPError, LocalTokenNotFoundError, RuntimeError, OSError, ValueError)
        try:
            return patiently(request, errors)
        except errors as error:
            raise ExportError(self._sentence(cause_of(error))) from None

    def _sentence(self, error: BaseException) -> str:
        where = f"{self.repo_id!r} on the Hub"
        status = status_of(error)
        if isinstance(error, GatedRepoError):
            return f"{where} is gated; ask its owner for access and pass that account's token."
        if isinstance(error, RevisionNotFoundError):
            return f"{where} has no revision {self.revision!r}; name an existing branch, or leave revision out."
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            return f"{where} asks for a valid token; pass token= or log in with `hf auth login`."
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return f"{where} does not exist or is not visible with this token; check the name and the token's account."
        if status == 403:
            return f"the token may not write to {where}; use one with write permission for that account."
        if status == 429:
            return f"the Hub limits the rate of requests to {self.repo_id!r}; wait a few minutes and push again."
        if status is not None:
            return f"the Hub answered {status} for {self.repo_id!r}; push again later, nothing is sent twice."
        return (
            f"pushing to {where} failed ({type(error).__name__}); check the network and push again, "
            "what was uploaded is not sent twice."
        )
