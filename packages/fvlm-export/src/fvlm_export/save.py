"""Saving a fine-tuned model: merged into a checkpoint that anything can serve, or as an adapter."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fvlm_core.errors import ConfigError
from fvlm_export.beside import (
    copy_code,
    write_card,
    write_config,
    write_generation_config,
    write_index,
    write_processor,
)
from fvlm_export.compute import Merger
from fvlm_export.plan import make_plan, parse_size
from fvlm_export.record import MergeReport, versions
from fvlm_export.task import Task, task_from_folder, task_from_model
from fvlm_export.work_folder import WorkFolder, check_space
from fvlm_export.write import write_shards

logger = logging.getLogger(__name__)

METHODS = ("merged_16bit", "merged_4bit", "lora")


def save_pretrained_merged(
    model_or_adapter_dir: Any,
    output_dir: str | os.PathLike[str],
    processor: Any = None,
    *,
    save_method: str = "merged_16bit",
    max_shard_size: str | int = "5GB",
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    progress: bool = True,
    overwrite: bool = False,
    adapters: Mapping[str, float] | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Save a model so that it can be served.

    Args:
        model_or_adapter_dir: a model in memory (with PEFT adapters or fully fine-tuned), an adapter's folder, or a model's
            folder. From folders, no model is loaded.
        output_dir: where; it appears when it is complete.
        processor: saved along; None: the files beside the adapter or the base are copied.
        save_method: ``"merged_16bit"``: the adapters merged into floating-point weights; ``"merged_4bit"``: those weights
            in NF4, for bitsandbytes; ``"lora"``: the adapter itself.
        max_shard_size: of one file; bytes, or a text such as ``"5GB"``.
        base: what to merge onto. None: the 16-bit checkpoint if the base was quantized while loading, the dequantized
            weights if the checkpoint itself is quantized, else the weights that the model holds. ``"original"``,
            ``"dequantized"`` (exactly what training saw), or a folder or Hub id.
        dtype: of all floating-point weights; None: as in the base.
        verify: prove the result before it appears.
        progress: show a progress bar.
        overwrite: replace an existing output folder.
        adapters: which adapters, with their weights: names in a live model, else folders (beside the first argument).
            None: the active ones of a live model, or the one folder, with weight 1.
        token: for a base on the Hub; it is never stored.
        trust_remote_code: allow a base to bring its own model class, when merging from folders.

    Returns:
        The output folder.

    Raises:
        ConfigError: an argument cannot be used, or the output exists.
        CheckpointError: the adapter or the base is missing, torn, or they do not fit each other.
        ExportError: the result could not be written or proved; nothing was left behind.
    """
    if save_method not in METHODS:
        raise ConfigError(f"save_method={save_method!r} is unknown; choose one of {', '.join(METHODS)}.")
    output = Path(output_dir).expanduser().absolute()
    limit, out_dtype = parse_size(max_shard_size), _parse_dtype(dtype)
    if save_method == "lora":
        from fvlm_export.lora import save_lora

        return save_lora(model_or_adapter_dir, output, processor, overwrite=overwrite)
    with WorkFolder(output, overwrite=overwrite) as work:
        task = _task(model_or_adapter_dir, base, adapters, token, trust_remote_code)
        logger.info("merging onto %s weights: %s", task.onto, task.why)
        _write_merged(task, work.path, output.name, processor, save_method, limit, out_dtype, progress)
        work.publish()
    return output


def _task(
    model: Any,
    base: str | os.PathLike[str] | None,
    adapters: Mapping[str, float] | None,
    token: str | bool | None,
    trust: bool,
) -> Task:
    if isinstance(model, (str, os.PathLike)):
        return task_from_folder(Path(model).expanduser(), base, adapters, token, trust)
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model_or_adapter_dir is a {type(model).__name__}; pass a model or the path of a folder.")
    return task_from_model(model, base, adapters, token)


@torch.no_grad()
def _write_merged(
    task: Task,
    folder: Path,
    title: str,
    processor: Any,
    save_method: str,
    max_shard_size: int,
    dtype: torch.dtype | None,
    progress: bool,
) -> None:
    quantize: frozenset[str] = frozenset()
    plan = make_plan(
        task.base,
        task.changes,
        live=task.live_values,
        dtype=dtype or task.dtype,
        quantize=quantize,
        max_shard_size=max_shard_size,
    )
    check_space(folder, plan.total)
    merger = Merger(task.base, task.live_values, _device(task))
    files = write_shards(plan, merger, folder, progress=progress)
    write_index(folder, plan)
    class_name = type(task.base.layout.skeleton.model).__name__
    write_config(folder, task.config, plan, None, class_name)
    write_generation_config(folder, task.live.base if task.live else None, task.source)
    write_processor(folder, processor, task.files_from)
    copy_code(folder, task.config, task.source)
    report = MergeReport(
        save_method=save_method,
        base=task.source.name if task.source else None,
        base_revision=task.source.revision if task.source else None,
        merged_onto=task.onto,
        why=task.why,
        adapters=task.adapters,
        tensors=sum(len(item.outputs) for item in plan.items),
        merged=sum(1 for item in plan.items if item.changes),
        overridden=list(merger.overridden),
        untied=list(plan.untied),
        files={file.name: file.sha256 for file in files},
        verified={},
        versions=versions(),
    )
    write_card(folder, report, "transformers", title)
    report.write(folder)


def _device(task: Task) -> torch.device:
    if task.live is not None:
        device: torch.device = task.live.base.device
        return device if device.type != "meta" else torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    from fvlm_core.precision import choose_dtype

    return None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
