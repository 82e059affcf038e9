"""A merge from folders: an adapter and its base, read tensor by tensor; no model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.checkpoint import Source, find_source, read_config
from fvlm_core.errors import CheckpointError, ConfigError, ExportError
from fvlm_core.precision import Precision, choose_dtype
from fvlm_export.adapter_folder import WEIGHTS, is_adapter, place_adapters, read_adapter_config
from fvlm_export.adapter_note import NOTE, read_note
from fvlm_export.adapters import base_changing, changes_of
from fvlm_export.base_check import fingerprint
from fvlm_export.bases import CheckpointBase
from fvlm_export.changes import Change
from fvlm_export.quantized import RoundTrip
from fvlm_export.record import Training
from fvlm_export.remote import Shard, commit_of, open_shards
from fvlm_export.safetensor_file import sha256_of
from fvlm_export.skeleton import skeleton_of
from fvlm_export.staging import warm_up
from fvlm_export.task import DEQUANTIZED, LIVE, ORIGINAL, Task, config_dtype, device_for_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def task_from_folder(
    folder: Path,
    base: str | os.PathLike[str] | None,
    adapters: Mapping[str, float] | None,
    token: str | bool | None,
    trust_remote_code: bool,
    scratch: Path,
) -> Task:
    """Work out a merge from an adapter's folder, or an export of a model's folder.

    Args:
        folder: an adapter, or a model.
        base: None or ``"original"``: the base that the adapter names; ``"dequantized"``: the same as training held it;
            else a folder or Hub id.
        adapters: see :func:`fvlm_export.save.save_pretrained_merged`.
        token: for a base on the Hub.
        trust_remote_code: whether the base may bring its own model class.
        scratch: where shards of a base on the Hub are kept while they are needed.

    Raises:
        ConfigError: an argument cannot be used.
        CheckpointError: a folder is missing or torn, or adapter and base do not fit.
        ExportError: the base has the right shapes and is not the one that the adapter was trained on.
    """
    if base is not None and str(base) == LIVE:
        raise ConfigError("base='live' needs the live model; pass it, or leave base out.")
    warm_up(device_for_files())
    dequantized = base is not None and str(base) == DEQUANTIZED
    base = None if dequantized else base
    folders = _adapter_folders(folder, adapters)
    hashes = _hashes(folders)
    source = _base_of(folder, folders, base, token)
    raw = read_config(source, trust_remote_code)
    config = _load_config(source, trust_remote_code)
    commit = commit_of(source.name, source.revision, config) if source.folder is None else None
    if commit is not None:
        source = replace(source, revision=commit)  # whatever is pushed there meanwhile
    skeleton = skeleton_of(config, trust=trust_remote_code)
    shards = open_shards(source, scratch)
    default = config_dtype(raw, torch.float16)
    through = _round_trip(folder, folders) if dequantized and not raw.get("quantization_config") else None
    checkpoint = CheckpointBase(shards, skeleton, None, default, through=through)
    changes: dict[str, list[Change]] = {}
    facts: dict[str, dict[str, Any]] = {}
    if folders:
        for path in folders:
            _check_adapter(path, shards, source)
        names = {f"adapter{number}": path for number, path in enumerate(folders)}
        placed = place_adapters(names, skeleton, checkpoint.layout)
        changes = placed.own_parameters()
        for param, own in changes_of(placed.model, {name: folders[path] for name, path in names.items()}).items():
            changes[param] = [*changes.get(param, []), *own]
        facts = _facts(folders, hashes)
    if through is not None:
        onto = DEQUANTIZED
        why = f"base='dequantized' was asked for: the base quantized to {through.bits} bit as in training, dequantized."
    elif checkpoint.quantized:
        onto, why = DEQUANTIZED, f"{Path(source.name).name} is itself quantized, so its weights are dequantized."
    else:
        onto, why = ORIGINAL, "The base checkpoint is not quantized, so its weights are used as they are."
    files_from = [*(find_source(path) for path in folders), source]
    dtype = None if through is None else through.dtype
    return Task(
        checkpoint,
        changes,
        onto,
        why,
        raw,
        source,
        facts,
        files_from,
        dtype=dtype,
        trust=trust_remote_code,
        revision=commit,
        training=_training(folders),
    )


def _hashes(folders: Iterable[Path]) -> dict[Path, Future[str]]:
    """Have the adapters' files hashed in the background; what cannot be read is an error where it is wanted."""
    with_it = ThreadPoolExecutor(1)
    hashes = {path: with_it.submit(sha256_of, path / WEIGHTS) for path in folders}
    with_it.shutdown(wait=False)
    return hashes


def _facts(folders: Mapping[Path, float], hashes: Mapping[Path, Future[str]]) -> dict[str, dict[str, Any]]:
    """Return adapter → its weight and hash: by its folder's name, and a number where another has that."""
    facts: dict[str, dict[str, Any]] = {}
    for path, weight in folders.items():
        name, number = path.resolve().name, 1
        while (f"{name} ({number})" if number > 1 else name) in facts:
            number += 1
        facts[f"{name} ({number})" if number > 1 else name] = {"weight": weight, "sha256": hashes[path].result()}
    return facts


def _training(folders: Mapping[Path, float]) -> Training:
    """Return what the adapters were trained on; metrics only of a single one, since they are of one model."""
    notes = [read_note(path) for path in folders]
    data = list(dict.fromkeys(name for note in notes for name in note.data))
    return Training(data, notes[0].metrics if len(notes) == 1 else {})


def _round_trip(folder: Path, folders: Mapping[Path, float]) -> RoundTrip:
    """Return how the base of the adapters was quantized while they were trained.

    Raises:
        ConfigError: it was not, or nothing says how, or the adapters do not agree.
    """
    notes = {path: read_note(path) for path in folders}
    for path, note in notes.items():
        if note.precision is None:
            raise ConfigError(
                f"base='dequantized': no {NOTE} in {path} says how the base was quantized in training; merge from the "
                "live model, or leave base out."
            )
    kinds = {(note.precision, note.dtype, tuple(note.quantized)) for note in notes.values()}
    if len(kinds) != 1:
        raise ConfigError(
            f"base='dequantized': {folder} holds no adapter, or the adapters were trained over bases quantized in "
            "different ways; leave base out."
        )
    ((precision, dtype, modules),) = kinds
    if not modules:
        raise ConfigError(
            f"base='dequantized': the adapter in {folder} was trained over weights that were not quantized; leave base "
            "out."
        )
    params = frozenset(f"{module}.weight" for module in modules)
    return RoundTrip(4 if precision == Precision.NF4.value else 8, choose_dtype(dtype, torch.device("cpu")), params)


def _adapter_folders(folder: Path, adapters: Mapping[str, float] | None) -> dict[Path, float]:
    if not folder.is_dir():
        raise CheckpointError(f"model_or_adapter_dir={str(folder)!r}: there is no such folder; check the path.")
    more = {Path(name): weight for name, weight in (adapters or {}).items()}
    if not is_adapter(folder):
        if more:
            raise ConfigError(f"adapters= was given, but {str(folder)!r} is no adapter; pass an adapter, and base=.")
        return {}
    for path in more:
        if not is_adapter(path):
            raise ConfigError(f"adapters names {str(path)!r}, which holds no adapter_config.json; check the path.")
    return more if folder in more else {folder: 1.0, **more}


def _base_of(
    folder: Path, folders: Mapping[Path, float], base: str | os.PathLike[str] | None, token: str | bool | None
) -> Source:
    if base is not None and str(base) != ORIGINAL:
        return find_source(base, None, token)
    if not folders:
        return find_source(folder, None, token)
    config = read_adapter_config(folder)
    if not config.base_model_name_or_path or not isinstance(config.base_model_name_or_path, str):
        raise ConfigError(f"{folder / 'adapter_config.json'} does not name its base; pass base=.")
    try:
        return find_source(config.base_model_name_or_path, config.revision, token)
    except CheckpointError as error:
        raise CheckpointError(f"the base that {folder} names cannot be had ({error}); pass it as base=.") from None


def _check_adapter(folder: Path, shards: Sequence[Shard], source: Source) -> None:
    init = read_adapter_config(folder).to_dict().get("init_lora_weights")
    if base_changing(init):
        raise ExportError(
            f"the adapter in {folder} was initialized with {init!r}, which changed the base weights, and a folder does "
            "not hold those; merge it from the live model."
        )
    recorded = read_note(folder).base_fingerprint
    found = fingerprint(shards)
    if recorded is not None and found is not None and recorded != found:
        raise ExportError(
            f"{source.name!r} is not the base that the adapter in {folder} was trained on: the shapes fit, the "
            f"weights differ; pass the right one as base=, or delete {NOTE} there if this is meant."
        )


def _load_config(source: Source, trust: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.name, trust_remote_code=trust, **source.options)  # type: ignore[no-any-return]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json of {source.name!r} cannot be used ({error}); get the checkpoint again."
        ) from error
