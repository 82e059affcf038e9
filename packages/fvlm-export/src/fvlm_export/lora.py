"""Saving the adapter itself, in PEFT's format, with what is needed to use it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fvlm_core.checkpoint import find_source, weight_files
from fvlm_core.errors import ConfigError, ExportError
from fvlm_core.origin import origin_of
from fvlm_export.adapter_folder import CONFIG, WEIGHTS, is_adapter, read_adapter_config
from fvlm_export.base_check import fingerprint
from fvlm_export.beside import write_card, write_processor
from fvlm_export.record import MergeReport, versions
from fvlm_export.safetensor_file import SafetensorFile
from fvlm_export.work_folder import WorkFolder


def save_lora(model_or_adapter_dir: Any, output: Path, processor: Any, *, overwrite: bool) -> Path:
    """Save an adapter with its processor and a model card.

    Args:
        model_or_adapter_dir: a PEFT model, or an adapter's folder (which is copied).
        output: where; it appears when it is complete.
        processor: saved along; None: what lies beside the adapter or its base.
        overwrite: replace an existing output folder.

    Raises:
        ConfigError: there is no adapter in what was given.
        ExportError: an adapter tensor is not finite, or the folder cannot be written.
    """
    with WorkFolder(output, overwrite=overwrite) as work:
        folder = work.path
        if isinstance(model_or_adapter_dir, (str, os.PathLike)):
            source = Path(model_or_adapter_dir)
            if not is_adapter(source):
                raise ConfigError(
                    f"{str(source)!r} holds no {CONFIG}, so it is no adapter; use save_method='merged_16bit'."
                )
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(source / name, folder / name)
            beside = [find_source(source)]
        else:
            _save_live(model_or_adapter_dir, folder)
            beside = []
        _check_finite(folder / WEIGHTS)
        config = read_adapter_config(folder)
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            beside.append(find_source(base))
        write_processor(folder, processor, beside)
        report = MergeReport(
            save_method="lora",
            base=base,
            base_revision=config.revision,
            merged_onto="none",
            why="The adapter is saved as it is.",
            base_fingerprint=_base_fingerprint(base),
            versions=versions(),
        )
        write_card(folder, report, "peft", output.name)
        report.write(folder)
        work.publish()
    return output


def _base_fingerprint(base: str | None) -> str | None:
    """Return the fingerprint of a local base, so that a later merge onto another one can be refused."""
    if not base or not Path(base).is_dir():
        return None
    return fingerprint(weight_files(find_source(base)))


def _save_live(model: Any, folder: Path) -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"save_method='lora' needs a model with an adapter, not a {type(model).__name__}; use save_method='merged_16bit'."
        )
    origin = origin_of(model)
    if origin is not None:  # what PEFT would write is where transformers found it, which may be a cache
        for config in model.peft_config.values():
            config.base_model_name_or_path = origin.source
            config.revision = origin.revision
    active = model.active_adapters
    model.save_pretrained(str(folder), selected_adapters=active)
    for name in active:  # PEFT puts any adapter but "default" into a folder of its own
        nested = folder / name
        if nested.is_dir() and len(active) == 1:
            for path in nested.iterdir():
                path.rename(folder / path.name)
            nested.rmdir()


def _check_finite(path: Path) -> None:
    file = SafetensorFile(path)
    for name in file.infos:
        tensor = file.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"adapter tensor {name!r} holds NaN or infinity; the training diverged.")
