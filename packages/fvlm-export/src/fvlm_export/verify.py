"""Proof that what was written is what was meant, before it is announced.

The files are opened anew and read back behind their writer (:mod:`fvlm_export.follow`). Every tensor must be there with
its dtype and shape, and finite; one that no adapter touches must equal the base's byte for byte (or its cast, where a
dtype was asked for); one that an adapter touches must on a sample equal the merge recomputed in fp64, to within the one
rounding that the output dtype costs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fvlm_core.errors import ExportError
from fvlm_export.changes import Change, merge
from fvlm_export.compute import Merger, all_finite
from fvlm_export.plan import Item, Plan
from fvlm_export.quantized import dequantize
from fvlm_export.safetensor_file import Buffers, SafetensorFile, TensorInfo

SAMPLE = 16  # merged tensors recomputed in fp64, spread evenly; every kind of change is among them
_WHOLE = 1 << 20  # elements; of larger tensors, rows at the beginning, the middle and the end are recomputed
_COMPUTE = 1e-5  # of the largest value: what fp32 arithmetic may add to the rounding of the result
_NF4 = 0.25  # NF4's relative error (Frobenius) is about 0.1 for normally distributed weights, more with outliers


class Verifier:
    """Checks items as they are read back; several threads may do so at once.

    Args:
        plan: what was meant.
        merger: gives unmerged values, and recomputes.
    """

    def __init__(self, plan: Plan, merger: Merger) -> None:
        self._plan, self._merger = plan, merger
        self._sampled = _sample([item for item in plan.items if item.changes])
        self._untouched = self._recomputed = self._tensors = 0
        self._worst = {"rounding": 0.0, "nf4": 0.0}
        self._parameters = merger.base.layout.skeleton.parameters
        self._lock, self._held = threading.Lock(), threading.local()

    def check_header(self, number: int, file: SafetensorFile) -> None:
        """Check that a file has the tensors that were planned for it.

        Args:
            number: of the shard in the plan.
            file: opened anew.

        Raises:
            ExportError: it has not; the message names the tensor.
        """
        wanted = {info.name: info for item in self._plan.shards[number] for info in item.outputs}
        if wanted != file.infos:
            name = next(iter(set(wanted.items()) ^ set(file.infos.items())))[0]
            raise ExportError(
                f"{file.path.name} does not hold {name!r} as planned; the disk may be failing, merge again."
            )

    def watched(self, item: Item, info: TensorInfo, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """Hand on a tensor's bytes as they are read back, and check what needs no more than a piece at a time.

        Raises:
            ExportError: bytes that no adapter touches differ from the base's, or a value is not finite.
        """
        copied = self._merger.copied_from(item)
        if copied is not None:
            pieces = _equal(info.name, pieces, copied.pieces(info.name, self._buffers()))
        # Buffers, and what the model does not load, may well hold infinity
        if info.dtype.is_floating_point and self._parameters.issuperset(item.slot.params) and item.slot.params:
            pieces = _finite(info, pieces, of_base=copied is not None)
        yield from pieces

    def check_item(self, item: Item, file: SafetensorFile) -> None:
        """Check the rest of an item that is in a file and was watched.

        Raises:
            ExportError: it is not what was meant.
        """
        with self._lock:
            self._tensors += len(item.outputs)
        if self._merger.copied_from(item) is not None:
            self._note(untouched=1)
            return
        if item.changes and id(item) not in self._sampled:
            return
        params = self._merger.unmerged(item)
        if params is None:
            _check_untouched(item, self._merger, file)
            self._note(untouched=1)
        elif id(item) in self._sampled:
            self._note(recomputed=1, errors=_recompute(item, params, self._merger, file))

    def _note(self, untouched: int = 0, recomputed: int = 0, errors: Mapping[str, float] | None = None) -> None:
        with self._lock:
            self._untouched += untouched
            self._recomputed += recomputed
            for name, error in (errors or {}).items():
                self._worst[name] = max(self._worst[name], error)

    def _buffers(self) -> Buffers:
        """Return this thread's buffers: several files may be read back at once."""
        if not hasattr(self._held, "buffers"):
            self._held.buffers = Buffers()
        return self._held.buffers  # type: ignore[no-any-return]

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


def _equal(name: str, ours: Iterable[memoryview], theirs: Iterable[memoryview]) -> Iterator[memoryview]:
    for piece, wanted in zip(ours, theirs, strict=True):
        if not _same_bytes(piece, wanted):
            raise ExportError(f"{name!r} differs from the base though no adapter touches it; merge again.")
        yield piece


def _same_bytes(first: memoryview, second: memoryview) -> bool:
    """Compare eight bytes at a time, as far as that goes: torch compares elements of any size at about one pace."""
    words = len(first) // 8 * 8
    if words and not torch.equal(*(torch.frombuffer(part[:words], dtype=torch.int64) for part in (first, second))):
        return False
    return first[words:] == second[words:]


def _finite(info: TensorInfo, pieces: Iterable[memoryview], *, of_base: bool) -> Iterator[memoryview]:
    for piece in pieces:
        if not all_finite(torch.frombuffer(piece, dtype=info.dtype)):
            where = "already in the base; get the checkpoint again" if of_base else "as written; merge again"
            raise ExportError(f"{info.name!r} holds NaN or infinity, {where}.")
        yield piece


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
