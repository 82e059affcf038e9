"""A merge from a model in memory.

What it is merged onto is the part that goes wrong most often elsewhere, so the rule stands alone here: a base that was
quantized while loading is taken from its 16-bit checkpoint, because rounding weights to 4 bit is a loss that nothing
requires; a checkpoint that is itself quantized has no original, so it is dequantized; weights that the model holds in
full are taken from the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fvlm_core.checkpoint import Source, find_source, read_config, weight_files
from fvlm_core.errors import CheckpointError, ConfigError, ExportError
from fvlm_core.origin import origin_of
from fvlm_export.adapters import adapters_to_merge, changes_base, changes_of
from fvlm_export.bases import CheckpointBase, LiveBase
from fvlm_export.layout import conversions_of
from fvlm_export.live import LiveModel, look_at
from fvlm_export.remote import commit_of
from fvlm_export.resume import hash_of_changes
from fvlm_export.safetensor_file import SafetensorFile
from fvlm_export.skeleton import plain_config, skeleton_of
from fvlm_export.task import DEQUANTIZED, LIVE, ORIGINAL, Task, config_dtype


@dataclass(frozen=True)
class Provenance:
    """Where a live model's base came from; from FVLM's own note, else from what transformers keeps."""

    source: str
    revision: str | None
    quantized: bool  # the checkpoint itself holds quantized weights
    dtype: torch.dtype
    trust: bool


def task_from_model(
    model: Any, base: str | os.PathLike[str] | None, adapters: Mapping[str, float] | None, token: str | bool | None
) -> Task:
    """Work out a merge from a model in memory.

    Args:
        model: a transformers model, with or without PEFT.
        base: None (the rule above), ``"original"``, ``"dequantized"``, or a folder or Hub id to merge onto.
        adapters: see :func:`fvlm_export.save.save_pretrained_merged`.
        token: for a base on the Hub.

    Raises:
        ConfigError: an argument cannot be used.
        CheckpointError: the base is missing, torn, or of another model.
        ExportError: an adapter cannot be merged.
    """
    live = look_at(model)
    if adapters and not live.adapted:
        raise ConfigError(f"adapters={dict(adapters)!r} was given, but the model holds no adapter.")
    chosen = adapters_to_merge(model, adapters) if live.adapted else {}
    origin = _provenance(live)
    onto, why, source = _choose(live, origin, base, changes_base(model, chosen), token)
    changes = changes_of(live.base, chosen)
    if chosen and not changes:
        raise ExportError(f"adapters {sorted(chosen)} change no parameter of the model; nothing would be merged.")
    known = source or (_source(origin, token) if origin and _at_hand(origin) else None)
    common: dict[str, Any] = {
        "changes": changes,
        "onto": onto,
        "why": why,
        "source": known,
        "adapters": {name: _facts(live, name, weight) for name, weight in chosen.items()},
        "files_from": [known] if known else [],
        "live": live,
        "trust": origin is not None and origin.trust,
        "revision": commit_of(known.name, origin.revision, live.base.config)
        if known and origin and known.name == origin.source
        else None,
    }
    default = origin.dtype if origin else live.base.dtype
    skeleton = skeleton_of(live.base.config, type(live.base))
    if source is None:
        live_base = LiveBase(live.base, live.tensors, live.quantized, skeleton, default)
        return Task(base=live_base, config=_live_config(live), dtype=default if live.quantized else None, **common)
    config = read_config(source, common["trust"])
    values = {
        name: tensor
        for name, tensor in live.tensors.items()
        if name in skeleton.parameters
        and name.removesuffix(".weight") not in live.quantized
        and tensor.device.type != "meta"
    }
    checkpoint = CheckpointBase(
        [SafetensorFile(path) for path in weight_files(source)],
        skeleton,
        conversions_of(skeleton, live.base),
        config_dtype(config, default),
        values,
    )
    if _resized(checkpoint, values):
        config = _live_config(live)
    return Task(base=checkpoint, config=config, live_values=values, **common)


def _facts(live: LiveModel, name: str, weight: float) -> dict[str, Any]:
    return {"weight": weight, "sha256": hash_of_changes(changes_of(live.base, {name: 1.0}))}


def _provenance(live: LiveModel) -> Provenance | None:
    origin = origin_of(live.base)
    if origin is not None:
        dtype = getattr(torch, origin.dtype)
        return Provenance(origin.source, origin.revision, origin.source_quantized, dtype, origin.trust_remote_code)
    name = live.base.name_or_path
    if not name:
        return None
    quantizer = live.base.__dict__.get("hf_quantizer")
    stored = quantizer is not None and bool(quantizer.pre_quantized)
    commit = commit_of(name, None, live.base.config)
    return Provenance(name, commit, stored, live.base.dtype, live.base.is_custom_code())


def _choose(
    live: LiveModel,
    origin: Provenance | None,
    base: str | os.PathLike[str] | None,
    changed: str | None,
    token: str | bool | None,
) -> tuple[str, str, Source | None]:
    """Return what to merge onto, why, and the checkpoint to read it from (None: the model itself)."""
    if base is not None and str(base) not in (ORIGINAL, DEQUANTIZED, LIVE):
        return ORIGINAL, "base= names this checkpoint.", find_source(base, None, token)
    if base == ORIGINAL and origin is None:
        raise ConfigError("base='original': the model does not say where it came from; pass base=FOLDER.")
    if not live.quantized:
        if base == ORIGINAL and origin is not None:
            return ORIGINAL, "base='original' was asked for.", _source(origin, token)
        return LIVE, "The model holds its base weights unquantized, so they are taken from it.", None
    bits = "4" if live.four_bit else "8"
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
        return DEQUANTIZED, f"The model does not say where it came from: its {bits}-bit weights are dequantized.", None
    if origin.quantized:
        name = Path(origin.source).name
        return DEQUANTIZED, f"{name} is itself quantized, so its {bits}-bit weights are dequantized.", None
    why = f"The base was quantized to {bits} bit while loading; the adapter is merged onto the checkpoint it came from."
    return ORIGINAL, why, _source(origin, token)


def _source(origin: Provenance, token: str | bool | None) -> Source:
    try:
        return find_source(origin.source, origin.revision, token)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base that the model was loaded from is gone ({error}); pass it as base=, or base='dequantized'."
        ) from None


def _at_hand(origin: Provenance) -> bool:
    return Path(origin.source).is_dir() or not Path(origin.source).is_absolute()


def _resized(base: CheckpointBase, values: Mapping[str, torch.Tensor]) -> bool:
    return any(
        tuple(values[param].shape) != base.infos[slot.stored[0]].shape
        for slot in base.slots
        if slot.conversion is None
        for param in slot.params
        if param in values
    )


def _live_config(live: LiveModel) -> dict[str, Any]:
    return json.loads(plain_config(live.base.config).to_json_string(use_diff=True))  # type: ignore[no-any-return]
