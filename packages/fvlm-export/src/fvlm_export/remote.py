"""A base on the Hub, a shard at a time.

Its headers are read first; a shard is fetched when its first tensor is needed and deleted when the last of them is
written, so the disk never holds the whole base.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import httpx
import torch
from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from fvlm_core.checkpoint import Source, shard_names, weight_files
from fvlm_core.errors import CheckpointError
from fvlm_export.retry import cause_of, patiently, status_of
from fvlm_export.safetensor_file import Buffers, SafetensorFile, TensorInfo, torch_dtype

_ERRORS = (HfHubHTTPError, httpx.HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


class Shard(Protocol):
    """One file of a checkpoint, wherever it lies."""

    @property
    def path(self) -> Path:
        """Where it is or will be."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """What it holds."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU; do not write to it."""

    def small(self, name: str) -> torch.Tensor:
        """Return a small tensor, without having the whole file for it."""

    def pieces(self, name: str, buffers: Buffers) -> Iterator[memoryview]:
        """Read a tensor's bytes piece by piece; each holds until the next but one."""

    def read(self, name: str, into: memoryview) -> None:
        """Read a tensor's bytes into memory as large as the tensor."""

    def prefetch(self, name: str) -> None:
        """Say that a tensor will be needed soon."""

    def release(self, name: str) -> None:
        """Say that a tensor is not needed for now."""

    def drop(self) -> None:
        """Say that no tensor will be needed again."""


class UnreachableError(CheckpointError):
    """The Hub did not give what was asked for; it may the next time."""


class RemoteShard:
    """One safetensors file on the Hub.

    Args:
        source: the repository.
        name: the file's.
        folder: where it is kept while it is needed.

    Raises:
        CheckpointError: its header cannot be had.
    """

    def __init__(self, source: Source, name: str, folder: Path) -> None:
        self._source, self._name, self._folder = source, name, folder
        self._file: SafetensorFile | None = None
        self._lock = threading.Lock()
        self._start: int | None = None
        api = HfApi(token=source.token)
        try:
            header = patiently(
                lambda: api.parse_safetensors_file_metadata(source.name, name, revision=source.revision), _ERRORS
            )
        except (*_ERRORS, SafetensorsParsingError) as error:
            raise _unreachable(source, name, error) from None
        self.infos = {
            key: TensorInfo(key, torch_dtype(entry.dtype), tuple(entry.shape)) for key, entry in header.tensors.items()
        }
        self._spans = {key: entry.data_offsets for key, entry in header.tensors.items()}

    @property
    def path(self) -> Path:
        """Where it is while it is needed."""
        return self._folder / self._name

    def _fetched(self) -> SafetensorFile:
        with self._lock:  # the writer, the reader behind it and the arithmetic may ask at once
            if self._file is None:
                self._file = SafetensorFile(self._download())
            return self._file

    def _download(self) -> Path:
        source, name, folder = self._source, self._name, self._folder
        try:
            path = patiently(
                lambda: hf_hub_download(
                    source.name, name, revision=source.revision, token=source.token, local_dir=folder
                ),
                _ERRORS,
            )
        except _ERRORS as error:
            raise _unreachable(source, name, error) from None
        return Path(path)

    def tensor(self, name: str) -> torch.Tensor:
        """See :class:`Shard`."""
        return self._fetched().tensor(name)

    def small(self, name: str) -> torch.Tensor:
        """See :class:`Shard`."""
        if self._file is not None:
            return self._file.tensor(name)
        if self._start is None:
            self._start = 8 + int.from_bytes(self._range(0, 8), "little")
        begin, end = self._spans[name]
        info, data = self.infos[name], self._range(self._start + begin, self._start + end)
        if len(data) != info.nbytes:
            raise CheckpointError(f"{self._name} of {self._source.name!r} came cut from the Hub; try again.")
        return torch.frombuffer(bytearray(data), dtype=info.dtype).reshape(info.shape)

    def _range(self, begin: int, end: int) -> bytes:
        source = self._source
        url = hf_hub_url(source.name, self._name, revision=source.revision)
        headers = {**build_hf_headers(token=source.token), "Range": f"bytes={begin}-{end - 1}"}

        def request() -> bytes:
            response = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
            return bytes(response.content)

        try:
            return patiently(request, _ERRORS)
        except _ERRORS as error:
            raise _unreachable(source, self._name, error) from None

    def pieces(self, name: str, buffers: Buffers) -> Iterator[memoryview]:
        """See :class:`Shard`."""
        return self._fetched().pieces(name, buffers)

    def read(self, name: str, into: memoryview) -> None:
        """See :class:`Shard`."""
        self._fetched().read(name, into)

    def prefetch(self, name: str) -> None:
        """See :class:`Shard`; nothing: it is fetched when it is needed, lest too much be on the disk."""

    def release(self, name: str) -> None:
        """See :class:`Shard`."""
        if self._file is not None:
            self._file.release(name)

    def drop(self) -> None:
        """See :class:`Shard`."""
        self._file = None
        self.path.unlink(missing_ok=True)


def open_shards(source: Source, folder: Path) -> Sequence[Shard]:
    """Open a checkpoint's shards: a folder's and cached ones where they are, the others on the Hub.

    Args:
        source: the checkpoint.
        folder: where shards from the Hub are kept while they are needed.

    Raises:
        CheckpointError: a shard is missing or torn, or the Hub cannot be reached.
    """
    if source.folder is not None or source.hub:
        return [SafetensorFile(path) for path in weight_files(source)]
    names = shard_names(source)
    cached = [try_to_load_from_cache(source.name, name, revision=source.revision) for name in names]
    return [
        SafetensorFile(Path(found)) if isinstance(found, str) else RemoteShard(source, name, folder)
        for name, found in zip(names, cached, strict=True)
    ]


def commit_of(name: str, revision: str | None, config: object) -> str | None:
    """Return the commit on the Hub that a config came from, or None where it is not known.

    transformers noted it in the config before 5.24; since then the folder of the cache tells that the config lies in.

    Args:
        name: of the repository, or a folder, which has no commit.
        revision: that was asked for.
        config: as transformers loaded it.
    """
    noted: str | None = vars(config).get("_commit_hash")
    if noted is not None or Path(name).is_dir():
        return noted
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _unreachable(source: Source, name: str, error: Exception) -> UnreachableError:
    cause = cause_of(error)
    status = status_of(cause)
    what = type(cause).__name__ if status is None else f"status {status}"
    return UnreachableError(
        f"{name} of {source.name!r} cannot be had from the Hub ({what}): check the name, the revision, the network "
        "and the token."
    )
