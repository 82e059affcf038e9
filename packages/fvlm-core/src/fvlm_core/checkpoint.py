"""A model's folder or Hub id, looked at before anything is loaded: what it is, and whether it is whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvlm_core.errors import CheckpointError, ConfigError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = "model{variant}.safetensors"
_INDEX = "model.safetensors.index{variant}.json"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is read from.

    Attributes:
        name: a folder, or a Hub id.
        revision: the Hub revision; None: the default branch.
        hub: what else the Hub functions of transformers are given (``cache_dir``, ``subfolder``, ...).
        token: for private repositories; it is kept out of the representation.
    """

    name: str
    revision: str | None = None
    hub: dict[str, Any] = field(default_factory=dict)
    token: str | bool | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hub id."""
        path = Path(self.name)
        return path / self.hub.get("subfolder", "") if path.is_dir() else None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the ``from_pretrained`` of transformers."""
        given = {"revision": self.revision, "token": self.token}
        return {**self.hub, **{key: value for key, value in given.items() if value is not None}}

    def file(self, name: str, required: bool = False) -> Path | None:
        """The path of one file of the checkpoint, downloaded if need be; None if the checkpoint has none.

        Args:
            name: the file's name.
            required: whether it is an error that the Hub cannot be asked; otherwise what is not cached is not there.

        Raises:
            CheckpointError: the repository or the revision cannot be reached.
        """
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        from transformers.utils import cached_file

        flags = {
            "_raise_exceptions_for_missing_entries": required,
            "_raise_exceptions_for_connection_errors": required,
        }
        try:
            found = cached_file(self.name, name, **flags, **self.options)
        except OSError as error:
            raise CheckpointError(
                f"{self.name!r} is no folder here and cannot be had from the Hub{self._at_revision()} "
                f"({_first_sentence(error)}): check the name, the revision, the network and the token."
            ) from None
        return None if found is None else Path(found)

    def json(self, name: str, required: bool = False) -> dict[str, Any] | None:
        """One JSON file of the checkpoint; None if it has none (see `file`).

        Raises:
            CheckpointError: the file is not a JSON object, or the repository cannot be reached.
        """
        path = self.file(name, required)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path} is not valid JSON ({error}): save or download the checkpoint again."
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no JSON object: save or download the checkpoint again.")
        return content

    def _at_revision(self) -> str:
        return f" at revision {self.revision!r}" if self.revision else ""


def find_source(
    model_name: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None, **hub: Any
) -> Source:
    """The source that a user's ``model_name`` means.

    Raises:
        ConfigError: it is empty or not a string or path, or `revision` or `token` is of the wrong kind.
        CheckpointError: it is a path, and no folder is there.
    """
    if not isinstance(model_name, str | os.PathLike) or not str(model_name).strip():
        raise ConfigError(f"model_name={model_name!r} is no folder or Hub id: pass one.")
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise ConfigError(f"revision={revision!r} is not a branch, tag or commit: pass its name, or None.")
    if token is not None and not isinstance(token, str | bool):
        raise ConfigError(f"token is of type {type(token).__name__}: pass its text, True for the stored one, or None.")
    name = os.path.expanduser(os.fspath(model_name)) if str(model_name).startswith("~") else os.fspath(model_name)
    path = Path(name)
    if path.is_file():
        raise CheckpointError(f"model_name={name!r} is a file: pass the folder that holds the checkpoint.")
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name
    if not path.is_dir() and looks_local:
        raise CheckpointError(f"model_name={name!r}: there is no such folder; check the path.")
    return Source(name, revision, hub, token)


def read_config(source: Source, trust_remote_code: bool) -> dict[str, Any]:
    """The checkpoint's ``config.json``, of a model type that can be loaded.

    Raises:
        CheckpointError: it is missing or torn, or of a type that transformers does not know.
    """
    from transformers import CONFIG_MAPPING

    config = source.json(CONFIG, required=True)
    if config is None:
        raise CheckpointError(
            f"{source.name!r} has no {CONFIG}, so it is no model checkpoint: pass a folder that save_pretrained wrote."
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{CONFIG} of {source.name!r} names no model_type: it is no transformers checkpoint, or is damaged."
        )
    if model_type in CONFIG_MAPPING:
        return config
    if "auto_map" not in config:
        raise CheckpointError(
            f"{CONFIG} of {source.name!r} has model_type {model_type!r}, which this version of transformers does not "
            "know: check the spelling, or upgrade transformers."
        )
    if not trust_remote_code:
        raise CheckpointError(
            f"{source.name!r} brings its own model code (model_type {model_type!r}): read it, and pass "
            "trust_remote_code=True if you trust it."
        )
    return config


def check_weights(source: Source, variant: str | None = None) -> None:
    """Check that a folder holds all its weights, as safetensors. Hub ids are checked as they are downloaded.

    Raises:
        CheckpointError: there are none, only pickled ones, or a shard is missing or torn.
    """
    folder = source.folder
    if folder is None:
        return
    single, index = _weight_file_names(variant)
    if not (folder / single).is_file() and not (folder / index).is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{source.name!r} has pickled weights only ({pickled[0]}), which can run any code when they are "
                "loaded: convert them to safetensors where you trust them."
            )
        raise CheckpointError(f"{source.name!r} has no {single} and no {index}: its weights are missing.")
    for name in shard_names(source, variant):
        _check_shard(folder / name)


def shard_names(source: Source, variant: str | None = None) -> list[str]:
    """The names of the checkpoint's safetensors files; as transformers does, one file goes before an index beside it.

    Raises:
        CheckpointError: the index is not one.
    """
    single, index = _weight_file_names(variant)
    if source.folder is not None and (source.folder / single).is_file():
        return [single]
    content = source.json(index)
    if content is None:
        return [single]
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} of {source.name!r} holds no weight_map: save or download the checkpoint again.")
    return sorted(set(weight_map.values()))


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in one safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is torn.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): save or download it again.") from None


def weight_files(source: Source, variant: str | None = None) -> list[Path]:
    """The checkpoint's safetensors files, downloaded if need be.

    Raises:
        CheckpointError: there are none, one is missing, or their index is not one.
    """
    names = shard_names(source, variant)
    found = [source.file(name) for name in names]
    missing = [name for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise CheckpointError(f"{source.name!r} lacks {missing[0]}: its weights are incomplete.")
    return [path for path in found if path is not None]


def _weight_file_names(variant: str | None) -> tuple[str, str]:
    suffix = f".{variant}" if variant else ""
    return _WEIGHTS.format(variant=suffix), _INDEX.format(variant=suffix)


def _check_shard(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, and the index names it: save or download the checkpoint again.")
    tensor_names(path)


def _first_sentence(error: BaseException) -> str:
    """The gist of a library's error: its first line, without its closing stop."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
