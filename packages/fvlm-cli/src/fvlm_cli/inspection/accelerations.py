"""Which accelerations a model gets on this machine, and why not the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fvlm_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fvlm_cli.inspection.opened import Opened

BFLOAT16 = 8.0  # the least compute capability with bfloat16 units


@dataclass(frozen=True)
class Acceleration:
    """Something that makes training faster or smaller.

    Attributes:
        name: what it is.
        applies: whether this model has it on this machine.
        why: what of the model it covers, or why it does not apply.
    """

    name: str
    applies: bool
    why: str


def accelerations(opened: Opened, devices: Sequence[dict[str, Any]]) -> list[Acceleration]:
    """Return what applies to a model and what does not.

    Args:
        opened: the model; fused layers are bound to its skeleton, to see which of them can be.
        devices: as `machine` describes them.
    """
    missing = _missing(devices)
    fused, left = _fused(opened)
    found = [
        _on_gpu("fused layers", missing, fused, left),
        _on_gpu(
            "CUDA graphs of checkpointed blocks", missing, bool(fused) and "every block that is checkpointed", left
        ),
        _on_gpu('"auto" checkpointing', missing, bool(fused) and "what CUDA graphs run, as far as there is room", left),
        _decoding(opened, missing),
        _on_gpu("4-bit kernels", missing, "NF4 of bitsandbytes, dequantized in one launch", ""),
        _on_gpu("flat optimizer", missing, "AdamW in 8 and 32 bit, SGD; adapters only", ""),
        _of_family(
            "vision attention without a loop", opened.facts.packs_images, "all images in one call", "packs images"
        ),
        _of_family(
            "positions planned with the batch",
            opened.facts.planner is not None,
            "by the collator's workers",
            "derives positions from image sizes",
        ),
        _packing(opened),
        _bytes(opened),
    ]
    if devices:
        oldest = min(float(device["capability"]) for device in devices)
        why = f"compute capability {oldest}; from {BFLOAT16} on" + (
            "" if oldest >= BFLOAT16 else ", so float16 is used"
        )
        found.append(Acceleration("bfloat16", oldest >= BFLOAT16, why))
    return found


def _missing(devices: Sequence[dict[str, Any]]) -> str:
    """Return what of the machine is missing for what runs on a GPU, or ""."""
    if not devices:
        return "there is no CUDA device here"
    if find_spec("triton") is None:
        return "triton is not installed"
    return ""


def _fused(opened: Opened) -> tuple[str, str]:
    """Return what of the model is fused, in words, and what is not and why."""
    from fvlm_core.fused import fuse_model

    try:
        report = fuse_model(opened.skeleton)
    except CheckpointError as error:  # the table is of another version of transformers
        return "", str(error)
    kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in Counter(report.fused.values()).items())
    left = "; ".join(f"{count} {reason}" for reason, count in Counter(report.left.values()).items())
    if not kinds:
        return "", left or f"no table of fused layers is written for {opened.facts.model_type}"
    return kinds + (f"; left as they are: {left}" if left else ""), ""


def _on_gpu(name: str, missing: str, covers: str | bool, otherwise: str) -> Acceleration:
    if not covers:
        return Acceleration(name, False, otherwise)
    return Acceleration(name, not missing, f"{missing} (for: {covers})" if missing else str(covers))


def _of_family(name: str, has: bool, covers: str, needs: str) -> Acceleration:
    return Acceleration(name, has, covers if has else f"this family is none that {needs}, or no facts say so")


def _decoding(opened: Opened, missing: str) -> Acceleration:
    from fvlm_core.decoding import decoding_unfit

    why = decoding_unfit(opened.skeleton)
    return _on_gpu("CUDA graphs of decoding steps", missing, why is None and "up to 8 rows, 4 or 16 bit", why or "")


def _packing(opened: Opened) -> Acceleration:
    from fvlm_core.arch import task_model
    from fvlm_core.arch.packing import packing_of

    try:
        packing_of(task_model(opened.skeleton))
    except ConfigError as error:
        return Acceleration("packing", False, str(error))
    return Acceleration("packing", True, "with data.packing: true")


def _bytes(opened: Opened) -> Acceleration:
    from fvlm_vision.pixels import keeps_bytes

    name = "pixels as bytes until the device"
    try:
        processor = opened.processor()
    except CheckpointError as error:
        return Acceleration(name, False, str(error))
    if keeps_bytes(processor):
        return Acceleration(name, True, "an eighth of what would be copied")
    kind = type(vars(processor).get("image_processor", processor)).__name__
    known = "Qwen2VLImageProcessor"
    why = "its settings, or this transformers, make other pixels" if kind == known else f"and this is {kind}"
    return Acceleration(name, False, f"it is known step by step for {known}, {why}")
