"""Proof that what was written is what was meant, before it is announced.

The files are opened anew. Every tensor must be there with its dtype and shape; one that no adapter touches must equal
the base's byte for byte (or its cast, where a dtype was asked for); one that an adapter touches must be finite, and on
a sample it must equal the merge recomputed in fp64, to within the one rounding that the output dtype costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fvlm_core.errors import ExportError
from fvlm_export.compute import Merger
from fvlm_export.plan import Item, Plan
from fvlm_export.quantized import dequantize
from fvlm_export.safetensor_file import SafetensorFile, TensorInfo

SAMPLE = 16  # merged tensors recomputed in fp64, spread evenly; every kind of change is among them
_COMPUTE = 1e-5  # of the largest value: what fp32 arithmetic may add to the rounding of the result
_NF4 = 0.25  # NF4's relative error (Frobenius) is about 0.1 for normally distributed weights, more with outliers


class Verifier:
    """Checks shards as they are finished.

    Args:
        plan: what was meant.
        merger: gives unmerged values, and recomputes.
    """

    def __init__(self, plan: Plan, merger: Merger) -> None:
        self._plan, self._merger = plan, merger
        self._sampled = _sample([item for item in plan.items if item.changes])
        self._untouched = self._recomputed = self._tensors = 0
        self._worst = {"rounding": 0.0, "nf4": 0.0}

    def check(self, number: int, path: Path) -> None:
        """Check one shard.

        Args:
            number: of the shard in the plan.
            path: its file.

        Raises:
            ExportError: something differs; the message names the tensor.
        """
        file = SafetensorFile(path)
        shard = self._plan.shards[number]
        wanted = {info.name: info for item in shard for info in item.outputs}
        if wanted != file.infos:
            name = next(iter(set(wanted.items()) ^ set(file.infos.items())))[0]
            raise ExportError(f"{path.name} does not hold {name!r} as planned; the disk may be failing, merge again.")
        for item in shard:
            self._check_item(item, file)
            self._merger.release(item)
            for info in item.outputs:
                file.release(info.name)
        self._tensors += len(wanted)

    def _check_item(self, item: Item, file: SafetensorFile) -> None:
        params = self._merger.unmerged(item)
        if params is None:
            _check_untouched(item, self._merger, file)
            self._untouched += 1
            return
        _check_finite(item, file)
        if id(item) in self._sampled:
            for name, error in _recompute(item, params, self._merger, file).items():
                self._worst[name] = max(self._worst[name], error)
            self._recomputed += 1

    def result(self) -> dict[str, Any]:
        """Return what was checked and the errors measured, for the report.

        Raises:
            ExportError: a planned tensor was never checked.
        """
        total = sum(len(item.outputs) for item in self._plan.items)
        if self._tensors != total:
            raise ExportError(f"{self._tensors} of {total} tensors were verified; this is an error in fvlm_export.")
        return {
            "tensors": total,
            "untouched_equal": self._untouched,
            "recomputed_in_fp64": self._recomputed,
            "largest_error": self._worst["rounding"],
            **({"largest_nf4_error": self._worst["nf4"]} if self._worst["nf4"] else {}),
        }


def _sample(items: Sequence[Item]) -> set[int]:
    step = max(1, len(items) // SAMPLE)
    chosen = {id(item) for item in items[::step]}
    kinds: dict[tuple[str, ...], int] = {}
    for item in items:
        kind = tuple(type(change).__name__ for changes in item.changes.values() for change in changes)
        kinds.setdefault(kind, id(item))
    return chosen | set(kinds.values())


def _written(item: Item, file: SafetensorFile, device: torch.device) -> dict[str, torch.Tensor]:
    """Return an item's tensors as read back, dequantized if they were quantized."""
    if len(item.outputs) == len(item.values):
        return {info.name: file.tensor(info.name).to(device) for info in item.values}
    packed, *parts = item.outputs
    value = dequantize(file.tensor(packed.name), {part.name: file.tensor(part.name) for part in parts}, device)
    return {packed.name: value}


def _check_untouched(item: Item, merger: Merger, file: SafetensorFile) -> None:
    base = merger.base.stored(item.slot, merger.device)
    if len(item.outputs) != len(item.values):
        ((name, value),) = _written(item, file, merger.device).items()
        _nf4_error(name, value, base[name].to(value))
        return
    for info in item.values:
        wanted = base[info.name].to(info.dtype).cpu()
        if not torch.equal(_bits(file.tensor(info.name), info), _bits(wanted, info)):
            raise ExportError(f"{info.name!r} differs from the base though no adapter touches it; merge again.")


def _bits(tensor: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if info.dtype is not torch.bool else tensor


def _check_finite(item: Item, file: SafetensorFile) -> None:
    for info in item.outputs:
        tensor = file.tensor(info.name)
        if info.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{info.name!r} was written with NaN or infinity; the disk may be failing, merge again.")


def _recompute(item: Item, params: dict[str, torch.Tensor], merger: Merger, file: SafetensorFile) -> dict[str, float]:
    exact = merger.exact(item, params, torch.float64)
    found = {"rounding": 0.0, "nf4": 0.0}
    for info, (name, value) in zip(item.values, _written(item, file, merger.device).items(), strict=True):
        if len(item.outputs) != len(item.values):
            found["nf4"] = _nf4_error(name, value.double(), exact[name])
            continue
        wanted = exact[name].double()
        error = (value.double() - wanted).abs()
        largest = float(wanted.abs().max())
        allowed = wanted.abs() * (torch.finfo(info.dtype).eps / 2) + largest * _COMPUTE + torch.finfo(info.dtype).tiny
        if bool((error > allowed).any()):
            raise ExportError(
                f"{name!r} is off by {float(error.max()):.3g} from the merge recomputed in fp64 (largest value "
                f"{largest:.3g}); merge again, and report it if it stays."
            )
        found["rounding"] = max(found["rounding"], float(error.max()) / largest if largest else 0.0)
    return found


def _nf4_error(name: str, value: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(wanted.double().norm())
    error = float((value.double() - wanted.double()).norm()) / norm if norm else 0.0
    if not error < _NF4:
        raise ExportError(f"{name!r} in NF4 is off by {error:.3g} of its norm; merge again, and report it if it stays.")
    return error
