"""Saving a fine-tuned model: merged into a checkpoint that anything can serve, or as an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fvlm_core.errors import ConfigError
from fvlm_core.precision import choose_dtype
from fvlm_export.build import Options, build
from fvlm_export.from_folder import task_from_folder
from fvlm_export.from_live import task_from_model
from fvlm_export.lora import save_lora
from fvlm_export.plan import parse_size
from fvlm_export.record import Training
from fvlm_export.task import Task
from fvlm_export.work_folder import SCRATCH, WorkFolder

METHODS = ("merged_16bit", "merged_4bit", "lora")


def save_pretrained_merged(
    model_or_adapter_dir: Any,
    output_dir: str | os.PathLike[str],
    processor: Any = None,
    save_method: str = "merged_16bit",
    *,
    max_shard_size: str | int = "5GB",
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    progress: bool = True,
    overwrite: bool = False,
    adapters: Mapping[str, float] | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    data: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save a model so that it can be served.

    Args:
        model_or_adapter_dir: a model in memory (with PEFT adapters or fully fine-tuned), an adapter's folder, or a
            model's folder. From folders, no model is loaded.
        output_dir: where; it appears when it is complete.
        processor: saved along; None: the files beside the adapter or the base are copied.
        save_method: ``"merged_16bit"``: the adapters merged into floating-point weights; ``"merged_4bit"``: those
            weights in NF4, for bitsandbytes; ``"lora"``: the adapter itself.
        max_shard_size: of one file; bytes, or a text such as ``"5GB"``.
        base: what to merge onto. None: the 16-bit checkpoint if the base was quantized while loading, the dequantized
            weights if the checkpoint itself is quantized, else the weights that the model holds. ``"original"``,
            ``"dequantized"`` (exactly what training saw; for a folder as its note says), or a folder or Hub id.
        dtype: of all floating-point weights; None: as in the base.
        verify: prove the result before it appears.
        progress: show a progress bar.
        overwrite: replace an existing output folder with all that is in it, if it holds a model or an adapter, and
            neither the current folder nor what is merged.
        adapters: which adapters, with their weights: names in a live model, else folders (beside the first argument).
            None: the active ones of a live model, or the one folder, with weight 1.
        token: for a base on the Hub; it is never stored.
        trust_remote_code: allow a base to bring its own model class, when merging from folders.
        data: what it was trained on, for the model card: ids of Hub datasets, or any names. Empty: what is noted beside
            the adapter.
        metrics: metric → value, for the model card; None: what is noted beside the adapter.

    Returns:
        The output folder.

    Raises:
        ConfigError: an argument cannot be used, or the output exists.
        CheckpointError: the adapter or the base is missing, torn, or they do not fit each other.
        ExportError: the result could not be written or proved; nothing that looks finished was left behind.
    """
    job = Job(model_or_adapter_dir, processor, save_method, base, adapters, token, trust_remote_code)
    training = Training(data, metrics or {})
    size, floats = parse_size(max_shard_size), parse_dtype(dtype)
    output = Path(output_dir).expanduser().absolute()
    with WorkFolder(output, overwrite=overwrite) as work:
        options = Options(save_method, size, floats, verify, progress, training, durable=work.replaces)
        job.run(work, output.name, options)
        work.publish()
    return output


class Job:
    """What is saved, without where; saving and pushing share it.

    The arguments are those of :func:`save_pretrained_merged`.

    Raises:
        ConfigError: the method is unknown, or the model is neither a model nor a path.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        save_method: str,
        base: str | os.PathLike[str] | None,
        adapters: Mapping[str, float] | None,
        token: str | bool | None,
        trust_remote_code: bool,
    ) -> None:
        if save_method not in METHODS:
            raise ConfigError(f"save_method={save_method!r} is unknown; choose one of {', '.join(METHODS)}.")
        if not isinstance(model, (str, os.PathLike, torch.nn.Module)):
            raise ConfigError(f"model_or_adapter_dir is a {type(model).__name__}; pass a model or a folder's path.")
        if save_method == "lora" and (base is not None or adapters is not None):
            raise ConfigError("save_method='lora' saves the active adapter as it is; leave base= and adapters= out.")
        self._model, self._processor, self._method = model, processor, save_method
        self._base, self._adapters, self._token, self._trust = base, adapters, token, trust_remote_code

    def run(
        self, work: WorkFolder, title: str, options: Options, sink: Callable[[Path, str], None] | None = None
    ) -> None:
        """Write everything into a work folder; see :func:`fvlm_export.build.build`."""
        folder = work.path
        if self._method == "lora":
            if options.dtype is not None:
                raise ConfigError("save_method='lora' saves the adapter in its own dtype; leave dtype= out.")
            work.check_reads(save_lora(self._model, folder, title, self._processor, options.training))
        else:
            task = self._task(folder / SCRATCH)
            work.check_reads(task.reads)
            build(task, folder, title, self._processor, options, sink)

    def _task(self, scratch: Path) -> Task:
        if isinstance(self._model, (str, os.PathLike)):
            path = Path(self._model).expanduser()
            return task_from_folder(path, self._base, self._adapters, self._token, self._trust, scratch)
        return task_from_model(self._model, self._base, self._adapters, self._token)


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Turn a dtype's name into the dtype; None stays None.

    Raises:
        ConfigError: it is none that weights are kept in.
    """
    return None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
