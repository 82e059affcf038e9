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
from fvlm_export.changes import Change, merge
from fvlm_export.compute import Merger, all_finite
from fvlm_export.plan import Item, Plan
from fvlm_export.quantized import dequantize
from fvlm_export.remote import Shard
from fvlm_export.safetensor_file import SafetensorFile

SAMPLE = 16  # merged tensors recomputed in fp64, spread evenly; every kind of change is among them
_WHOLE = 1 << 20  # elements; of larger tensors, rows at the beginning, the middle and the end are recomputed
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
        copied = self._merger.copied_from(item)
        if copied is not None:
            _check_copied(item.values[0].name, copied, file)
            self._untouched += 1
            return
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


def _check_copied(name: str, source: Shard, file: SafetensorFile) -> None:
    for ours, theirs in zip(file.pieces(name), source.pieces(name), strict=True):
        if not torch.equal(torch.frombuffer(ours, dtype=torch.uint8), torch.frombuffer(theirs, dtype=torch.uint8)):
            raise ExportError(f"{name!r} differs from the base though no adapter touches it; merge again.")


def _check_untouched(item: Item, merger: Merger, file: SafetensorFile) -> None:
    base = merger.base.stored(item.slot, merger.device)
    if len(item.outputs) != len(item.values):
        ((name, value),) = _written(item, file, merger.device).items()
        _nf4_error(name, value, base[name].to(value))
        return
    for info in item.values:
        wanted = base[info.name].to(info.dtype).cpu()
        if not torch.equal(_bits(file.tensor(info.name)), _bits(wanted)):
            raise ExportError(f"{info.name!r} differs from the base though no adapter touches it; merge again.")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _check_finite(item: Item, file: SafetensorFile) -> None:
    for info in item.outputs:
        tensor = file.tensor(info.name)
        if info.dtype.is_floating_point and not all_finite(tensor):
            raise ExportError(f"{info.name!r} was written with NaN or infinity; the disk may be failing, merge again.")


def _recompute(item: Item, params: dict[str, torch.Tensor], merger: Merger, file: SafetensorFile) -> dict[str, float]:
    """Recompute an item in fp64 and return the errors: whole if it is small or was converted, else a sample of rows."""
    found = {"rounding": 0.0, "nf4": 0.0}
    written = _written(item, file, merger.device)
    if len(item.outputs) != len(item.values) or item.slot.conversion is not None:
        exact = merger.base.layout.to_stored(
            item.slot, {n: merge(v, item.changes.get(n, []), torch.float64) for n, v in params.items()}
        )
        for name, value in written.items():
            if len(item.outputs) != len(item.values):
                found["nf4"] = _nf4_error(name, value, exact[name])
            else:
                found["rounding"] = max(found["rounding"], _rounding_error(name, value, exact[name]))
        return found
    ((param, base),) = params.items()
    ((name, value),) = written.items()
    changes = item.changes.get(param, [])
    for part in _row_samples(base, value, changes):
        cut = changes if part is None else [c for change in changes if (c := change.rows(part)) is not None]
        rows = (base, value) if part is None else (base[part], value[part])
        exact_rows = merge(rows[0], cut, torch.float64)
        found["rounding"] = max(found["rounding"], _rounding_error(name, rows[1], exact_rows))
    return found


def _row_samples(base: torch.Tensor, value: torch.Tensor, changes: Sequence[Change]) -> list[slice | None]:
    whole = base.numel() <= _WHOLE or base.shape != value.shape
    if whole or any(change.rows(slice(0, 1)) is None for change in changes):
        return [None]
    count = base.shape[0]
    step = max(1, _WHOLE // 4 * count // base.numel())
    return [slice(start, min(start + step, count)) for start in (0, count // 2, max(0, count - step))]


def _rounding_error(name: str, value: torch.Tensor, exact: torch.Tensor) -> float:
    wanted = exact.double()
    error = (value.double() - wanted).abs()
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    info = torch.finfo(value.dtype)
    if bool((error > wanted.abs() * (info.eps / 2) + largest * _COMPUTE + info.tiny).any()):
        raise ExportError(
            f"{name!r} is off by {float(error.max()):.3g} from the merge recomputed in fp64 (largest value "
            f"{largest:.3g}); merge again, and report it if it stays."
        )
    return float(error.max()) / largest if largest else 0.0


def _nf4_error(name: str, value: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(wanted.double().norm())
    error = float((value.double() - wanted.double()).norm()) / norm if norm else 0.0
    if not error < _NF4:
        raise ExportError(f"{name!r} in NF4 is off by {error:.3g} of its norm; merge again, and report it if it stays.")
    return error
