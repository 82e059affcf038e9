"""Saving the adapter itself, in PEFT's format, with what is needed to use it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fvlm_core.checkpoint import Source, find_source, weight_files
from fvlm_core.errors import ConfigError, ExportError
from fvlm_core.origin import origin_of
from fvlm_export.adapter_folder import CONFIG, WEIGHTS, is_adapter, read_adapter_config
from fvlm_export.adapter_note import note_of, read_note
from fvlm_export.base_check import fingerprint
from fvlm_export.beside import write_card, write_processor
from fvlm_export.record import NO_TRAINING, MergeReport, Training, versions
from fvlm_export.safetensor_file import SafetensorFile, sha256_of


def save_lora(
    model_or_adapter_dir: Any, folder: Path, title: str, processor: Any, training: Training = NO_TRAINING
) -> list[Path]:
    """Write an adapter with its processor and a model card into a work folder.

    Args:
        model_or_adapter_dir: a PEFT model with one active adapter, or an adapter's folder (which is copied).
        folder: where.
        title: of the model card.
        processor: saved along; None: what lies beside the adapter or its base.
        training: for the card; what is empty in it comes from the adapter's note.

    Returns:
        The folders that were read.

    Raises:
        ConfigError: there is not exactly one adapter to save in what was given.
        CheckpointError: the adapter's folder is torn.
        ExportError: an adapter tensor is not finite.
    """
    beside: list[Source] = []
    if isinstance(model_or_adapter_dir, (str, os.PathLike)):
        source = Path(model_or_adapter_dir).expanduser()
        if not is_adapter(source):
            raise ConfigError(f"{str(source)!r} holds no {CONFIG}, so it is no adapter; use 'merged_16bit'.")
        for name in (CONFIG, WEIGHTS):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        note = read_note(source)
        beside.append(find_source(source))
    else:
        _save_live(model_or_adapter_dir, folder)
        note = note_of(model_or_adapter_dir)
    tensors = _check_finite(folder / WEIGHTS)
    config = read_adapter_config(folder)
    base = config.base_model_name_or_path
    known = find_source(base) if base and Path(base).is_dir() else None
    if known is not None:
        beside.append(known)
    write_processor(folder, processor, beside)
    if note.base_fingerprint is None and known is not None:
        files = [SafetensorFile(path) for path in weight_files(known)]
        note = replace(note, base=base, base_revision=config.revision, base_fingerprint=fingerprint(files))
    note = replace(note, data=list(training.data) or note.data, metrics=dict(training.metrics) or note.metrics)
    note.write(folder)
    report = MergeReport(
        save_method="lora",
        base=base,
        base_revision=config.revision,
        merged_onto="none",
        why="The adapter is saved as it is.",
        base_fingerprint=note.base_fingerprint,
        tensors=tensors,
        files={WEIGHTS: sha256_of(folder / WEIGHTS)},
        data=note.data,
        metrics=note.metrics,
        versions=versions(),
    )
    write_card(folder, report, "peft", title)
    report.write(folder)
    return [source.folder for source in beside if source.folder is not None]


def _save_live(model: Any, folder: Path) -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"save_method='lora' needs a model with an adapter, not a {type(model).__name__}; use 'merged_16bit'."
        )
    active = model.active_adapters
    if len(active) != 1:
        raise ConfigError(f"save_method='lora' saves one adapter and {active} are active; choose with set_adapter.")
    config = model.peft_config[active[0]]
    before = config.base_model_name_or_path, config.revision
    origin = origin_of(model)
    if origin is not None:  # what PEFT would write is where transformers found it, which may be a cache
        config.base_model_name_or_path, config.revision = origin.source, origin.revision
    try:
        model.save_pretrained(str(folder), selected_adapters=active)
    finally:
        config.base_model_name_or_path, config.revision = before
    nested = folder / active[0]
    if nested.is_dir():  # PEFT puts any adapter but "default" into a folder of its own
        for path in nested.iterdir():
            path.rename(folder / path.name)
        nested.rmdir()


def _check_finite(path: Path) -> int:
    file = SafetensorFile(path)
    for name in file.infos:
        tensor = file.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"adapter tensor {name!r} holds NaN or infinity; the training diverged.")
    return len(file.infos)
