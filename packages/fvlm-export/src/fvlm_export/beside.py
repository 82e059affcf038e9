"""What lies beside the weights: config, generation config, processor and tokenizer, index, model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.checkpoint import Source
from fvlm_core.errors import ConfigError
from fvlm_export.plan import Plan
from fvlm_export.record import MergeReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
)
_GENERATION = "generation_config.json"


def write_index(folder: Path, plan: Plan) -> None:
    """Write the index of a checkpoint in several shards; one file needs none."""
    if len(plan.shards) == 1:
        return
    weight_map = {
        info.name: plan.file_name(number)
        for number, shard in enumerate(plan.shards)
        for item in shard
        for info in item.outputs
    }
    index = {"metadata": {"total_size": plan.total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def main_dtype(plan: Plan) -> torch.dtype | None:
    """Return the floating-point dtype that most bytes of the (not quantized) weights have."""
    sizes: dict[torch.dtype, int] = {}
    for item in plan.items:
        for info in item.values:
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def write_config(
    folder: Path, config: dict[str, Any], plan: Plan, quantization: dict[str, Any] | None, class_name: str
) -> None:
    """Write ``config.json``.

    Args:
        folder: where.
        config: the base's own, as a dict; it is not changed.
        plan: what was written: its dtype, and whether a tie was cut.
        quantization: of a 4-bit output; None: the output is not quantized.
        class_name: of the model, where the base's config names none.
    """
    final: dict[str, Any] = json.loads(json.dumps(config))
    dtype = main_dtype(plan)
    for level in _levels(final):
        level.pop("quantization_config", None)
        for key in ("dtype", "torch_dtype"):
            if level.get(key) is not None and dtype is not None:
                level[key] = str(dtype).removeprefix("torch.")
        if plan.untied and level.get("tie_word_embeddings"):
            level["tie_word_embeddings"] = False
    if plan.untied:
        final["tie_word_embeddings"] = False
    if not final.get("architectures"):
        final["architectures"] = [class_name]
    if quantization is not None:
        final["quantization_config"] = quantization
    _write_json(folder / "config.json", final)


def _levels(config: dict[str, Any]) -> Iterable[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            yield from _levels(value)


def write_generation_config(folder: Path, live: PreTrainedModel | None, source: Source | None) -> None:
    """Write the generation config of a live model, or copy the base's; a base without one gets none."""
    if live is not None and live.can_generate() and live.generation_config is not None:
        live.generation_config.to_json_file(folder / _GENERATION)
    elif source is not None:
        _copy(source, _GENERATION, folder)


def write_processor(folder: Path, processor: Any, sources: Iterable[Source]) -> None:
    """Write the processor with its tokenizer and chat template.

    Args:
        folder: where.
        processor: anything with ``save_pretrained``; None: the files of the first source that has any are copied.
        sources: an adapter's folder first, then the base.

    Raises:
        ConfigError: ``processor`` cannot be saved.
    """
    if processor is not None:
        if not hasattr(processor, "save_pretrained"):
            raise ConfigError(
                f"processor={processor!r} has no save_pretrained; pass the processor or tokenizer itself."
            )
        processor.save_pretrained(str(folder))
        return
    for source in sources:
        if [name for name in _PROCESSOR_FILES if _copy(source, name, folder)]:
            return


def copy_code(folder: Path, config: dict[str, Any], source: Source | None) -> None:
    """Copy the model code that a checkpoint brings along, so that the output loads as the base does."""
    for entry in (config.get("auto_map") or {}).values() if source is not None else ():
        for target in entry if isinstance(entry, list) else [entry]:
            if isinstance(target, str) and "--" not in target and source is not None:
                _copy(source, f"{target.split('.')[0]}.py", folder)


def _copy(source: Source, name: str, folder: Path) -> bool:
    found = source.file(name)
    if found is not None:
        shutil.copyfile(found, folder / name)
    return found is not None


def write_card(folder: Path, report: MergeReport, library: str, title: str) -> None:
    """Write a short model card, unless the processor or the user left one.

    Args:
        folder: where.
        report: what is said about the making.
        library: ``transformers`` or ``peft``.
        title: the heading.
    """
    base = report.base if report.base and not Path(report.base).is_absolute() else None
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    named = [name for name in report.data if _is_hub_id(name)]
    lines += ["datasets:", *(f"- {json.dumps(name)}" for name in named)] if named else []
    lines += [
        "tags:",
        "- fvlm",
        "- lora" if library == "peft" else f"- {report.save_method}",
        "---",
        "",
        f"# {title}",
        "",
    ]
    name = Path(report.base).name if report.base else "a model in memory"
    if library == "peft":
        lines.append(f"A LoRA adapter for `{base or name}`, made with FVLM.")
    else:
        lines.append(
            f"`{base or name}` with {_adapters_text(report)}, written by fvlm-export as `{report.save_method}`."
        )
        lines += ["", f"Merged onto: {report.merged_onto}. {report.why}"]
    if report.data:
        lines += ["", f"Trained on: {', '.join(f'`{name}`' for name in report.data)}."]
    if report.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in report.metrics.items()]
    lines += ["", f"Versions: {', '.join(f'{k} {v}' for k, v in report.versions.items())}.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).suffix and not Path(name).exists()


def _adapters_text(report: MergeReport) -> str:
    count = len(report.adapters)
    if count == 0:
        return "no adapter"
    return "a LoRA adapter merged in" if count == 1 else f"{count} LoRA adapters merged in"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
