"""What a call means: which base, which changes, and why that base.

The choice is the part that today's tools get wrong, so it stands alone: a 4-bit load of a 16-bit checkpoint is merged onto
the 16-bit original, because rounding the weights to 4 bit is a loss that nothing requires; a checkpoint that is itself
quantized has no original, so it is dequantized; weights that the model holds in full are taken from the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.checkpoint import Source, find_source, read_config, weight_files
from fvlm_core.errors import CheckpointError, ConfigError, ExportError
from fvlm_core.origin import Origin, origin_of
from fvlm_export.adapter_folder import is_adapter, place_adapters, read_adapter_config
from fvlm_export.adapters import adapters_to_merge, changes_base, changes_of
from fvlm_export.bases import Base, CheckpointBase, LiveBase
from fvlm_export.changes import Change
from fvlm_export.live import LiveModel, look_at
from fvlm_export.skeleton import plain_config, skeleton_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ORIGINAL, DEQUANTIZED, LIVE = "original", "dequantized", "live"


@dataclass(frozen=True)
class Task:
    """A merge, ready to be planned.

    Attributes:
        base: what is merged onto.
        changes: parameter → what the adapters do to it.
        onto: ``original``, ``dequantized`` or ``live``.
        why: one sentence on that.
        config: the output's config before it is adapted, as a dict.
        source: the base checkpoint; None: unknown.
        adapters: adapter → its weight (and file hash), for the report.
        files_from: where processor files are looked for if no processor is given.
        live: the live model; None when merging folders.
        live_values: see :class:`fvlm_export.compute.Merger`.
        dtype: the floating dtype of the output where the caller asks for none; None: each tensor keeps its own.
        trust: whether the base may bring its own model class.
    """

    base: Base
    changes: dict[str, list[Change]]
    onto: str
    why: str
    config: dict[str, Any]
    source: Source | None
    adapters: dict[str, dict[str, Any]]
    files_from: list[Source]
    live: LiveModel | None = None
    live_values: dict[str, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    trust: bool = False

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        if self.live is not None:
            return torch.device("cpu") if self.live.base.device.type == "meta" else self.live.base.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def task_from_model(
    model: Any, base: str | os.PathLike[str] | None, adapters: Mapping[str, float] | None, token: str | bool | None
) -> Task:
    """Work out a merge from a model in memory.

    Args:
        model: a transformers model, with or without PEFT.
        base: None (the rule above), ``"original"``, ``"dequantized"``, or a folder or Hub id to merge onto.
        adapters: see :func:`fvlm_export.save.save_pretrained_merged`.
        token: for a base on the Hub.
    """
    live = look_at(model)
    origin = origin_of(model)
    chosen = adapters_to_merge(model, adapters) if live.adapted else {}
    if adapters and not live.adapted:
        raise ConfigError(f"adapters={dict(adapters)!r} was given, but the model holds no adapter.")
    changed = changes_base(model, chosen) if chosen else None
    onto, why, source = _choose(live, origin, base, changed, token)
    changes = changes_of(live.base, chosen)
    if chosen and not changes:
        raise ExportError(f"adapters {sorted(chosen)} change no parameter of the model; nothing would be merged.")
    known = source or (find_source(origin.source, origin.revision, token) if origin and _exists(origin) else None)
    common: dict[str, Any] = {
        "changes": changes,
        "onto": onto,
        "why": why,
        "adapters": {name: {"weight": weight} for name, weight in chosen.items()},
        "files_from": [known] if known else [],
        "live": live,
        "trust": origin is not None and origin.trust_remote_code,
    }
    default = getattr(torch, origin.dtype) if origin else live.base.dtype
    skeleton = skeleton_of(live.base.config, type(live.base))
    if source is None:
        live_base = LiveBase(live.base, live.tensors, live.quantized, skeleton, default)
        config = _as_dict(plain_config(live.base.config))
        dtype = default if live.quantized else None
        return Task(base=live_base, config=config, source=known, dtype=dtype, **common)
    from fvlm_export.layout import conversions_of

    config = read_config(source, common["trust"])
    values = {n: t for n, t in live.tensors.items() if n.removesuffix(".weight") not in live.quantized}
    values = {n: t for n, t in values.items() if t.device.type != "meta" and n in skeleton.parameters}
    resized = {n for n, t in values.items() if n in skeleton.shapes}
    conversions = conversions_of(skeleton, live.base)
    files = weight_files(source)
    checkpoint = CheckpointBase(files, skeleton, conversions, _config_dtype(config, default), resized)
    if any(
        tuple(values[n].shape) != checkpoint.infos[s.stored[0]].shape
        for s in checkpoint.slots
        for n in s.params
        if s.conversion is None and n in values
    ):
        config = _as_dict(plain_config(live.base.config))
    return Task(base=checkpoint, config=config, source=source, live_values=values, **common)


def _choose(
    live: LiveModel,
    origin: Origin | None,
    base: str | os.PathLike[str] | None,
    changed: str | None,
    token: str | bool | None,
) -> tuple[str, str, Source | None]:
    """Return what to merge onto, why, and the checkpoint to read it from (None: the model itself)."""
    if base is not None and str(base) not in (ORIGINAL, DEQUANTIZED, LIVE):
        return ORIGINAL, "base= names this checkpoint.", find_source(base, None, token)
    bits = "4" if live.four_bit else "8"
    if not live.quantized:
        if base == ORIGINAL and origin is not None:
            return ORIGINAL, "base='original' was asked for.", find_source(origin.source, origin.revision, token)
        return LIVE, "The model holds its base weights unquantized, so they are taken from it.", None
    if base in (DEQUANTIZED, LIVE):
        return DEQUANTIZED, f"base={base!r} was asked for: the {bits}-bit weights that training saw, dequantized.", None
    if changed is not None:
        if base == ORIGINAL:
            raise ExportError(
                f"the adapter was initialized with {changed!r}, which changed the base weights, so it does not fit the "
                "original; leave base out."
            )
        return DEQUANTIZED, f"The adapter was initialized with {changed!r}, which changed the base weights.", None
    if origin is None:
        if base == ORIGINAL:
            raise ConfigError(
                "base='original' was asked for, but the model does not say where it came from; pass base=FOLDER."
            )
        return (
            DEQUANTIZED,
            f"The model does not say where it came from, so its {bits}-bit weights are dequantized.",
            None,
        )
    if origin.source_quantized:
        return (
            DEQUANTIZED,
            f"{Path(origin.source).name} is itself quantized, so its {bits}-bit weights are dequantized.",
            None,
        )
    why = f"The base was quantized to {bits} bit while loading; the adapter is merged onto the checkpoint it came from."
    return ORIGINAL, why, find_source(origin.source, origin.revision, token)


def task_from_folder(
    folder: Path,
    base: str | os.PathLike[str] | None,
    adapters: Mapping[str, float] | None,
    token: str | bool | None,
    trust_remote_code: bool,
) -> Task:
    """Work out a merge from an adapter's folder, or an export of a model's folder; no model is loaded."""
    if base is not None and str(base) in (DEQUANTIZED, LIVE):
        raise ConfigError(
            f"base={str(base)!r} needs the live model, because a folder does not hold what training saw; pass the model."
        )
    folders = _adapter_folders(folder, adapters)
    source = _base_of(folder, folders, base, token)
    raw = read_config(source, trust_remote_code)
    config = _load_config(source, trust_remote_code)
    skeleton = skeleton_of(config, trust=trust_remote_code)
    checkpoint = CheckpointBase(weight_files(source), skeleton, None, _config_dtype(raw, torch.float16))
    changes: dict[str, list[Change]] = {}
    facts: dict[str, dict[str, Any]] = {}
    if folders:
        names = {f"adapter{number}": path for number, path in enumerate(folders)}
        _refuse_changed_bases(list(folders))
        placed = place_adapters(names, skeleton, checkpoint.layout)
        weights = {name: folders[path] for name, path in names.items()}
        changes = placed.own_parameters()
        for param, own in changes_of(placed.model, weights).items():
            changes[param] = [*changes.get(param, []), *own]
        facts = {path.name: {"weight": weight, "sha256": _sha256(path)} for path, weight in folders.items()}
    if checkpoint.quantized:
        onto, why = DEQUANTIZED, f"{Path(source.name).name} is itself quantized, so its weights are dequantized."
    else:
        onto, why = ORIGINAL, "The base checkpoint is not quantized, so its weights are used as they are."
    files_from = [*(find_source(path) for path in folders), source]
    return Task(checkpoint, changes, onto, why, raw, source, facts, files_from, trust=trust_remote_code)


def _adapter_folders(folder: Path, adapters: Mapping[str, float] | None) -> dict[Path, float]:
    if not folder.is_dir():
        raise CheckpointError(f"model_or_adapter_dir={str(folder)!r}: there is no such folder; check the path.")
    more = {Path(name): weight for name, weight in (adapters or {}).items()}
    if not is_adapter(folder):
        if more:
            raise ConfigError(
                f"adapters= was given, but {str(folder)!r} is no adapter; pass one of the adapters, and base=."
            )
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
    if not config.base_model_name_or_path:
        raise ConfigError(f"{folder}/adapter_config.json does not name its base; pass base=.")
    return find_source(config.base_model_name_or_path, config.revision, token)


def _refuse_changed_bases(folders: list[Path]) -> None:
    from fvlm_export.adapters import base_changing

    for path in folders:
        init = read_adapter_config(path).to_dict().get("init_lora_weights")
        if base_changing(init):
            raise ExportError(
                f"the adapter in {path} was initialized with {init!r}, which changed the base weights, and a folder does "
                "not hold those; merge it from the live model."
            )


def _load_config(source: Source, trust: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.name, trust_remote_code=trust, **source.options)  # type: ignore[no-any-return]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json of {source.name!r} cannot be used ({error}); get the checkpoint again."
        ) from error


def _config_dtype(config: dict[str, Any], default: torch.dtype) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name) if isinstance(name, str) and hasattr(torch, name) else default
    return dtype if isinstance(dtype, torch.dtype) else default


def _as_dict(config: PretrainedConfig) -> dict[str, Any]:
    import json

    return json.loads(config.to_json_string(use_diff=True))  # type: ignore[no-any-return]


def _exists(origin: Origin) -> bool:
    return Path(origin.source).is_dir()


def _sha256(folder: Path) -> str:
    import hashlib

    from fvlm_export.adapter_folder import WEIGHTS

    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
