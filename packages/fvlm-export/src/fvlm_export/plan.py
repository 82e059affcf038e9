"""What will be written: every output tensor in order, what it is made of, and which shard it goes to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fvlm_core.errors import CheckpointError, ConfigError
from fvlm_export.bases import Base
from fvlm_export.changes import Change, Form, LowRank, Replacement, Rows, result_shape
from fvlm_export.layout import Slot
from fvlm_export.quantized import nf4_infos
from fvlm_export.safetensor_file import TensorInfo

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Item:
    """One slot of the output.

    Attributes:
        slot: where its unmerged values are.
        values: its tensors before a possible quantization, under their stored names.
        outputs: its tensors as written.
        changes: parameter → what the adapters do to it.
        copy_of: for a parameter that was tied and no longer is: the parameter that holds its unmerged value.
    """

    slot: Slot
    values: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    changes: Mapping[str, list[Change]] = field(default_factory=dict)
    copy_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(info.nbytes for info in self.outputs)


@dataclass(frozen=True)
class Plan:
    """Everything that will be written.

    Attributes:
        shards: the items of each file, in order.
        untied: parameters that share the base's tensor there and have their own in the output.
        total: bytes of all tensors.
    """

    shards: tuple[tuple[Item, ...], ...]
    untied: tuple[str, ...]
    total: int

    @property
    def items(self) -> Iterable[Item]:
        """All items in the order in which they are written."""
        return (item for shard in self.shards for item in shard)

    def file_name(self, number: int) -> str:
        """Return the name of a shard, counted from 0."""
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"


def parse_size(text: str | int) -> int:
    """Turn ``"5GB"`` (decimal), ``"5GiB"`` (binary) or a number of bytes into bytes.

    Raises:
        ConfigError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get((match.group(2) or "B").upper()) if match else None
    size = int(float(match.group(1)) * unit) if match and unit else 0
    if size <= 0:
        raise ConfigError(f"max_shard_size={text!r} is no size; give bytes or a text such as '5GB' or '500MB'.")
    return size


def make_plan(
    base: Base,
    changes: Mapping[str, list[Change]],
    *,
    live: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    quantize: frozenset[str],
    max_shard_size: int,
) -> Plan:
    """Lay out the output.

    Args:
        base: what is merged onto.
        changes: parameter → its changes.
        live: see :class:`fvlm_export.compute.Merger`; a resized embedding has its size from here.
        dtype: of every floating-point tensor written; None: each keeps its own.
        quantize: parameters that are written as NF4.
        max_shard_size: bytes; a tensor that is larger gets a shard of its own.

    Raises:
        CheckpointError: a change fits no parameter of the base, or has another shape.
    """
    kept, untied = _settle_ties(base, changes)
    held = {param for slot in base.slots for param in slot.params}
    for param in kept:
        if param not in held and param not in untied:
            raise CheckpointError(
                f"the adapter changes {param!r}, which the base does not hold; pass its own base as base=."
            )
    items = [_item(base, slot, kept, untied, live, dtype, quantize) for slot in base.slots]
    new = {param: source for param, source in untied.items() if param not in held}
    items += [_untied_item(base, param, source, kept, dtype, quantize) for param, source in new.items()]
    total = sum(item.nbytes for item in items)
    return Plan(tuple(_shards(items, max_shard_size)), tuple(untied), total)


def _item(
    base: Base,
    slot: Slot,
    changes: Mapping[str, list[Change]],
    untied: Mapping[str, str],
    live: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    quantize: frozenset[str],
) -> Item:
    own = {param: changes[param] for param in slot.params if param in changes}
    values = [_cast(base.infos[name], dtype) for name in slot.stored]
    if slot.conversion is None and slot.params:
        info, param = values[0], slot.params[0]
        shape = tuple(live[param].shape) if param in live else info.shape
        values = [TensorInfo(info.name, info.dtype, result_shape(shape, own.get(param, [])))]
    # A checkpoint may store a tied parameter all the same; what the model computed with is the one it is tied to
    source = untied.get(slot.params[0]) if slot.params else None
    return Item(slot, tuple(values), _outputs(values, slot, quantize), own, copy_of=source)


def _untied_item(
    base: Base,
    param: str,
    source: str,
    changes: Mapping[str, list[Change]],
    dtype: torch.dtype | None,
    quantize: frozenset[str],
) -> Item:
    holder = next(slot for slot in base.slots if source in slot.params)
    like = _cast(base.infos[holder.stored[0]], dtype)
    own = {param: changes[param]} if param in changes else {}
    shape = result_shape(base.layout.skeleton.shapes[param], own.get(param, []))
    slot = Slot((base.layout.stored_name(param),), (param,))
    values = [TensorInfo(slot.stored[0], like.dtype, shape)]
    return Item(slot, tuple(values), _outputs(values, slot, quantize), own, copy_of=source)


def _cast(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.name, dtype, info.shape) if dtype is not None and info.dtype.is_floating_point else info


def _outputs(values: list[TensorInfo], slot: Slot, quantize: frozenset[str]) -> tuple[TensorInfo, ...]:
    if slot.conversion is None and slot.params and slot.params[0] in quantize:
        return tuple(nf4_infos(values[0]))
    return tuple(values)


def _shards(items: list[Item], limit: int) -> Iterable[tuple[Item, ...]]:
    """Cut items into as few shards as the limit allows, all about as large: they are written side by side."""
    sizes = [item.nbytes for item in items]
    count, low, high = len(_cut(sizes, limit)), 1, limit
    while low < high:  # the lowest limit that needs no more shards
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(sizes, middle)) <= count else (middle + 1, high)
    begin = 0
    for end in _cut(sizes, high):
        yield tuple(items[begin:end])
        begin = end


def _cut(sizes: list[int], limit: int) -> list[int]:
    """Return where shards end that are filled in order up to a limit; what is larger than that gets its own."""
    ends, size = [], 0
    for number, more in enumerate(sizes):
        if number and size + more > limit:
            ends.append(number)
            size = 0
        size += more
    return [*ends, len(sizes)]


def _settle_ties(base: Base, changes: Mapping[str, list[Change]]) -> tuple[dict[str, list[Change]], dict[str, str]]:
    """Decide which tied parameters stay tied: those that no adapter touches, or that all adapters change alike."""
    kept = dict(changes)
    untied: dict[str, str] = {}
    for param, source in base.layout.skeleton.tied.items():
        if param not in changes and source not in changes:
            continue
        if _alike(changes.get(param, []), changes.get(source, [])):
            kept.pop(param, None)
        else:
            untied[param] = source
    return kept, untied


def _alike(first: list[Change], second: list[Change]) -> bool:
    return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))


def _same(first: Change, second: Change) -> bool:
    if isinstance(first, Replacement) and isinstance(second, Replacement):
        return _equal(first.tensor, second.tensor)
    if isinstance(first, Rows) and isinstance(second, Rows):
        return torch.equal(first.index, second.index) and _equal(first.tensor, second.tensor)
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        plain = first.magnitude is None and second.magnitude is None and first.scaling == second.scaling
        return plain and all(_equal(a, b) for a, b in zip(_factors(first), _factors(second), strict=True))
    return False


def _factors(change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return (change.a.T, change.b.T) if change.form is Form.EMBEDDING else (change.b, change.a)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first.detach(), second.detach())
