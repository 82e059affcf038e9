"""A task carried out: the complete folder, proved, not yet published."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fvlm_export import beside
from fvlm_export.base_check import check_live_base, fingerprint
from fvlm_export.bases import Base, CheckpointBase
from fvlm_export.clock import Clock
from fvlm_export.compute import Merger
from fvlm_export.four_bit import modules_to_quantize, quantization_config
from fvlm_export.plan import Plan, make_plan
from fvlm_export.probe import probe
from fvlm_export.record import NO_TRAINING, MergeReport, Training, versions
from fvlm_export.resume import Journal, merge_key
from fvlm_export.safetensor_writer import WrittenFile
from fvlm_export.task import DEQUANTIZED, LIVE, Task
from fvlm_export.verify import Verifier
from fvlm_export.work_folder import check_space
from fvlm_export.write import How, lanes_for, write_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How a task is carried out; see :func:`fvlm_export.save.save_pretrained_merged`.

    Attributes:
        durable: whether what is finished must be on the disk, because it takes an older result's place.
        clock: told what the time goes into.
    """

    save_method: str
    max_shard_size: int
    dtype: torch.dtype | None
    verify: bool
    progress: bool
    training: Training = NO_TRAINING
    durable: bool = False
    clock: Clock = field(default_factory=Clock)


@torch.no_grad()
def build(
    task: Task,
    folder: Path,
    title: str,
    processor: Any,
    options: Options,
    sink: Callable[[Path, str], None] | None = None,
) -> MergeReport:
    """Write everything into a work folder and prove it.

    Args:
        task: what to merge onto what.
        folder: the work folder, empty or left by a killed run.
        title: of the model card.
        processor: see :func:`fvlm_export.save.save_pretrained_merged`.
        options: how.
        sink: takes each shard when it is proved; the shard is deleted when this returns.

    Raises:
        CheckpointError: the adapter and the base do not fit.
        ExportError: the result cannot be written or proved.
    """
    logger.info("merging onto %s weights: %s", task.onto, task.why)
    skeleton = task.base.layout.skeleton
    quantize = modules_to_quantize(skeleton, task.live) if options.save_method == "merged_4bit" else frozenset()
    plan = make_plan(
        task.base,
        task.changes,
        live=task.live_values,
        dtype=options.dtype or task.dtype,
        quantize=frozenset(f"{name}.weight" for name in quantize),
        max_shard_size=options.max_shard_size,
    )
    verified: dict[str, Any] = {}
    if task.live is not None and isinstance(task.base, CheckpointBase) and task.live.quantized:
        where = task.source.name if task.source else "the checkpoint"
        verified["base_weights_compared"] = check_live_base(task.base, task.live, where)
    base_print = fingerprint(task.base.shards) if isinstance(task.base, CheckpointBase) else None
    journal = Journal(folder, _key(task, plan, options, base_print))
    needed = max(sum(item.nbytes for item in shard) for shard in plan.shards) if sink is not None else plan.total
    if isinstance(task.base, CheckpointBase):
        needed += task.base.fetched_at_most
    check_space(folder, needed - sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    how = _how(task.base, plan, options, sink)
    merger = Merger(task.base, task.live_values, task.device, held=2 if how.lanes == 1 else 1)
    verifier = Verifier(plan, merger) if options.verify else None
    with _full_precision(), options.clock.during("shards"):
        files = _write_and_check(plan, merger, folder, journal, verifier, how, sink)
    if verifier is not None:
        verified["weights"] = verifier.result()
    _write_beside(task, plan, folder, processor, quantize)
    if options.verify and task.live is not None and sink is not None:
        verified["logits"] = {"skipped": "the shards were sent and deleted one by one"}
    elif options.verify and task.live is not None:
        exact = task.onto in (DEQUANTIZED, LIVE) and not quantize
        weights = {name: float(facts["weight"]) for name, facts in task.adapters.items()}
        verified["logits"] = probe(folder, task.live, processor, weights=weights, exact=exact, trust=task.trust)
    report = MergeReport(
        save_method=options.save_method,
        base=task.source.name if task.source else None,
        base_revision=task.revision or (task.source.revision if task.source else None),
        base_fingerprint=base_print,
        merged_onto=task.onto,
        why=task.why,
        adapters=task.adapters,
        tensors=sum(len(item.outputs) for item in plan.items),
        merged=sum(1 for item in plan.items if item.changes),
        overridden=sorted(merger.overridden),
        untied=list(plan.untied),
        files={file.name: file.sha256 for file in files},
        verified=verified,
        data=list(options.training.data or task.training.data),
        metrics=dict(options.training.metrics or task.training.metrics),
        versions=versions(),
    )
    beside.write_card(folder, report, "transformers", title)
    report.write(folder)
    journal.close()
    logger.debug("seconds over all threads: %s", options.clock.seconds, extra={"seconds": options.clock.seconds})
    return report


def _write_and_check(
    plan: Plan,
    merger: Merger,
    folder: Path,
    journal: Journal,
    verifier: Verifier | None,
    how: How,
    sink: Callable[[Path, str], None] | None,
) -> list[WrittenFile]:
    base, files = merger.base, []
    for number, file in write_shards(plan, merger, folder, journal, verifier, how):
        if sink is not None:
            path = folder / file.name
            sink(path, file.name)
            path.unlink()
        files.append(file)
        if isinstance(base, CheckpointBase):
            base.keep(merger.source_of(item) for shard in plan.shards[number + 1 :] for item in shard)
    return files


def _how(base: Base, plan: Plan, options: Options, sink: Callable[[Path, str], None] | None) -> How:
    ahead = sink is None and (not isinstance(base, CheckpointBase) or base.at_hand)
    lanes = lanes_for(plan) if ahead and isinstance(base, CheckpointBase) else 1
    return How(options.progress, ahead=ahead, lanes=lanes, durable=options.durable, clock=options.clock)


def _write_beside(task: Task, plan: Plan, folder: Path, processor: Any, quantize: frozenset[str]) -> None:
    skeleton = task.base.layout.skeleton
    dtype = beside.main_dtype(plan) or torch.bfloat16
    quantization = quantization_config(skeleton, quantize, dtype) if quantize else None
    beside.write_index(folder, plan)
    beside.write_config(folder, task.config, plan, quantization, type(skeleton.model).__name__)
    beside.write_generation_config(folder, task.live.base if task.live else None, task.source)
    beside.write_processor(folder, processor, task.files_from)
    beside.copy_code(folder, task.config, task.source)


def _key(task: Task, plan: Plan, options: Options, base_print: str | None) -> str | None:
    """Return what identifies the merge; None where values come from memory, which a later run could not be sure of."""
    commit = None if task.source is None or task.revision is None else f"{task.source.name}@{task.revision}"
    base = base_print or commit
    if base is None or task.live is not None:
        return None
    facts = {
        "base": base,
        "onto": task.why,
        "method": options.save_method,
        "device": task.device.type,
        "adapters": json.dumps([*task.adapters.values()]),  # whatever their folders are called
        **versions(),
    }
    return merge_key(plan, task.changes, facts)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 while merging, whatever the training script chose, and put its choice back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
