"""Which shards an earlier run of the same merge, killed or interrupted, has finished.

The work folder keeps a journal: the key of the merge, then one line for each finished shard. A later run with the same
key takes those shards over after reading them once more; with any other key, or with none, it starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from fvlm_export.changes import Addition, Change, LowRank, Replacement, Rows
from fvlm_export.plan import Plan
from fvlm_export.safetensor_file import as_bytes, sha256_of
from fvlm_export.safetensor_writer import WrittenFile

JOURNAL = ".journal.jsonl"


class Journal:
    """The finished shards of a work folder.

    Args:
        folder: the work folder; whatever belongs to another merge is removed from it.
        key: what identifies this merge; None: it cannot be resumed (its base lives in memory).
    """

    def __init__(self, folder: Path, key: str | None) -> None:
        self._folder, self._path = folder, folder / JOURNAL
        self._done = _read(self._path, key) if key is not None else {}
        for path in folder.iterdir():
            if (
                path.name not in self._done
                and path.name != JOURNAL
                and path.is_file()
                and not path.name.startswith(".")
            ):
                path.unlink()
        lines = [{"key": key}, *(asdict(file) for file in self._done.values())]
        partial = folder / f"{JOURNAL}.partial"  # written anew, lest a line follow one that was cut
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(partial, self._path)

    def finished(self, name: str) -> WrittenFile | None:
        """Return a shard that is finished and still what it was; a damaged one is removed."""
        file = self._done.get(name)
        path = self._folder / name
        if file is None:
            return None
        if path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256:
            return file
        path.unlink(missing_ok=True)
        return None

    def note(self, file: WrittenFile) -> None:
        """Add a finished shard."""
        with self._path.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(asdict(file)) + "\n")

    def close(self) -> None:
        """Remove the journal; the folder is finished."""
        self._path.unlink(missing_ok=True)


def keep_finished(folder: Path, also: frozenset[str]) -> int:
    """Remove from a work folder all that is not finished.

    Args:
        folder: the work folder.
        also: names of what else stays, if any shard does.

    Returns:
        How many finished shards are left; 0: there is nothing that a rerun could take over, and nothing was removed.
    """
    finished = [name for name in _noted(folder / JOURNAL) if (folder / name).is_file()]
    if not finished:
        return 0
    for path in folder.iterdir():
        if path.name in also or path.name == JOURNAL or path.name in finished:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    return len(finished)


def merge_key(plan: Plan, changes: Mapping[str, list[Change]], facts: Mapping[str, str]) -> str:
    """Return what identifies a merge: every output tensor, what is done to it, and what it is made of.

    Args:
        plan: what will be written, where.
        changes: parameter → what the adapters do to it; not by which values, which the facts must tell.
        facts: anything else that the result depends on: the hashes of the adapters' files are among them.
    """
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for shard in plan.shards:
        for item in shard:
            digest.update(repr((item.outputs, item.copy_of)).encode())
        digest.update(b"|")
    digest.update(hash_of_changes(changes, values=False).encode())
    return digest.hexdigest()


def hash_of_changes(changes: Mapping[str, list[Change]], *, values: bool = True) -> str:
    """Return a hash of everything that adapters do: which parameters they change, in what form, by which values.

    Args:
        changes: parameter → what the adapters do to it.
        values: whether the values of their tensors count; else only the tensors' shapes and dtypes do.
    """
    digest = hashlib.sha256()
    for param in sorted(changes):
        for change in changes[param]:
            digest.update(f"{param}{type(change).__name__}".encode())
            _hash_change(digest, change, values)
    return digest.hexdigest()


def _hash_change(digest: hashlib._Hash, change: Change, values: bool) -> None:
    tensors: list[torch.Tensor | None] = []
    if isinstance(change, LowRank):
        digest.update(f"{change.scaling!r}{change.form.name}".encode())
        tensors = [change.a, change.b, change.magnitude]
    elif isinstance(change, Rows):
        digest.update(as_bytes(change.index.cpu()))  # of the adapter's config
        tensors = [change.tensor]
    elif isinstance(change, Addition):
        digest.update(repr(change.scaling).encode())
        tensors = [change.tensor]
    elif isinstance(change, Replacement):
        tensors = [change.tensor]
    for tensor in tensors:
        if tensor is not None:
            digest.update(as_bytes(tensor.cpu()) if values else f"{tuple(tensor.shape)}{tensor.dtype}".encode())


def _noted(path: Path) -> dict[str, WrittenFile]:
    """Return the shards that a journal names, whichever merge that a later run can repeat it is of."""
    if not path.is_file():
        return {}
    first, *_ = path.read_text(encoding="utf-8").splitlines() or ["{}"]
    try:
        key = json.loads(first).get("key")
    except (ValueError, AttributeError):
        return {}
    return {} if key is None else _read(path, key)


def _read(path: Path, key: str) -> dict[str, WrittenFile]:
    if not path.is_file():
        return {}
    found: dict[str, WrittenFile] = {}
    first, *lines = path.read_text(encoding="utf-8").splitlines() or ["{}"]
    try:
        if json.loads(first).get("key") != key:
            return {}
        for line in lines:
            entry = json.loads(line)
            found[entry["name"]] = WrittenFile(entry["name"], entry["size"], entry["sha256"], tuple(entry["tensors"]))
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut; what stands before it counts
        return found
    return found
