"""The values of one output item: read, changed, rounded once, quantized if asked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fvlm_core.errors import ExportError
from fvlm_export.bases import Base
from fvlm_export.changes import merge_rounded
from fvlm_export.layout import Slot
from fvlm_export.plan import Item
from fvlm_export.quantized import nf4_tensors
from fvlm_export.remote import Shard
from fvlm_export.safetensor_file import as_bytes
from fvlm_export.staging import Scratch


class Merger:
    """Computes items; several threads may ask at once.

    Args:
        base: where unmerged values come from.
        live: parameter → the tensor of a live model that is not quantized there. Where it differs from the base, it was
            trained or merged in place, and it wins.
        device: where the arithmetic is done.
        held: how many items' outputs a thread holds at once.

    Attributes:
        overridden: the parameters whose live value won.
    """

    def __init__(self, base: Base, live: Mapping[str, torch.Tensor], device: torch.device, held: int) -> None:
        self.base, self._live, self.device = base, live, device
        self.overridden: dict[str, None] = {}
        self._scratch = Scratch(held, locked=device.type == "cuda")

    def unmerged(self, item: Item) -> dict[str, torch.Tensor] | None:
        """Return an item's parameters before the adapters; None if its stored bytes can be kept as they are."""
        slot = self.source_of(item)
        replaced = {p: self._live[p] for p in slot.params if p in self._live}
        if not item.changes and not replaced and item.copy_of is None:
            return None
        params = self.base.params(slot, self.device)
        changed = {p: live for p, live in replaced.items() if not _same_values(params[p], live)}
        self.overridden.update(dict.fromkeys(changed))
        params.update({p: live.detach().to(self.device) for p, live in changed.items()})
        if item.copy_of is not None:
            return {item.slot.params[0]: params[item.copy_of]}
        return params if item.changes or changed else None

    def values(self, item: Item) -> dict[str, torch.Tensor]:
        """Return an item's stored tensors, rounded to the dtype that the plan gives them.

        Raises:
            ExportError: a merged value is not finite.
        """
        own = self._read(item)
        params = self.unmerged(item) if own is None else own
        if params is None:
            stored = self.base.stored(item.slot, self.device)
            return {info.name: stored[info.name].to(info.dtype) for info in item.values}
        dtype = item.values[0].dtype
        merged = {
            name: merge_rounded(value, item.changes[name], dtype, None if own is None else value)
            if name in item.changes
            else value
            for name, value in params.items()
        }
        found = self.base.layout.to_stored(item.slot, merged)
        for info in item.values:
            shape = tuple(found[info.name].shape)
            if shape != info.shape:
                raise ExportError(
                    f"{info.name!r} came out with shape {shape} where {info.shape} was planned; this is an error in "
                    "fvlm_export, please report it."
                )
            if not all_finite(found[info.name]):
                raise ExportError(f"merging {info.name!r} gives NaN or infinity in {dtype}; pass dtype='bfloat16'.")
        return {info.name: found[info.name].to(info.dtype) for info in item.values}

    def _read(self, item: Item) -> dict[str, torch.Tensor] | None:
        """Read an item's parameter into memory of our own, to be merged and written from there; None: it cannot be.

        That is faster than by the page, if all of it is needed.
        """
        if self.device.type != "cpu" or not item.changes or item.slot.conversion is not None:
            return None
        file = self._file_as_planned(item)
        if file is None:
            return None
        (param,), (info,) = item.slot.params, item.values
        value = self._scratch.take(info.shape, info.dtype)
        file.read(info.name, as_bytes(value))
        return {param: value}

    def copied_from(self, item: Item) -> Shard | None:
        """Return the base's file whose bytes an item keeps; None: its values are computed, cast or quantized."""
        return None if item.changes else self._file_as_planned(item)

    def _file_as_planned(self, item: Item) -> Shard | None:
        """Return the base's file that holds an item, before the adapters, in the dtype and shape that is planned."""
        if len(item.values) != 1 or item.outputs != item.values or item.copy_of is not None:
            return None
        (info,) = item.values
        if self.base.infos.get(info.name) != info or any(param in self._live for param in item.slot.params):
            return None
        return self.base.file_of(info.name)

    def outputs(self, item: Item) -> dict[str, torch.Tensor]:
        """Return an item's tensors as they are written, on the CPU.

        They hold until this thread asks for the next item, or for the one after if two are held.
        """
        values = self.values(item)
        if len(item.outputs) == len(item.values):
            return {name: self._on_cpu(value, len(values) == 1) for name, value in values.items()}
        ((name, value),) = values.items()
        return nf4_tensors(name, value.to(self.device))

    def _on_cpu(self, value: torch.Tensor, single: bool) -> torch.Tensor:
        if value.device.type == "cpu" or not single:
            return value.cpu()
        return self._scratch.take(tuple(value.shape), value.dtype).copy_(value)

    def prefetch(self, item: Item) -> None:
        """Say that an item will be wanted soon."""
        self.base.prefetch(self.source_of(item))

    def source_of(self, item: Item) -> Slot:
        """Return the slot of the base that holds an item's unmerged value."""
        if item.copy_of is None:
            return item.slot
        return next(slot for slot in self.base.slots if item.copy_of in slot.params)

    def release(self, item: Item) -> None:
        """Say that an item is written."""
        self.base.release(self.source_of(item))


def _same_values(stored: torch.Tensor, live: torch.Tensor) -> bool:
    return stored.shape == live.shape and torch.equal(stored.to(live), live.detach())


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity: NaN would be its minimum, infinity an extreme; one fast pass."""
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # torch finds no extremes of 8-bit floats
        tensor = tensor.float()
    low, high = tensor.aminmax()
    return math.isfinite(float(low)) and math.isfinite(float(high))
