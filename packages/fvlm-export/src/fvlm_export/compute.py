"""The values of one output item: read, changed, rounded once, quantized if asked."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fvlm_core.errors import ExportError
from fvlm_export.bases import Base
from fvlm_export.changes import merge
from fvlm_export.layout import Slot
from fvlm_export.plan import Item
from fvlm_export.quantized import nf4_tensors


class Merger:
    """Computes items.

    Args:
        base: where unmerged values come from.
        live: parameter → the tensor of a live model that is not quantized there. Where it differs from the base, it was
            trained or merged in place, and it wins.
        device: where the arithmetic is done.

    Attributes:
        overridden: the parameters whose live value won, in the order met.
    """

    def __init__(self, base: Base, live: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.base, self._live, self.device = base, live, device
        self.overridden: dict[str, None] = {}

    def unmerged(self, item: Item) -> dict[str, torch.Tensor] | None:
        """Return an item's parameters before the adapters; None if its stored bytes can be kept as they are."""
        slot = self._source(item)
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

    def exact(self, item: Item, params: Mapping[str, torch.Tensor], compute: torch.dtype) -> dict[str, torch.Tensor]:
        """Return an item's merged stored tensors, not yet rounded.

        Args:
            item: the item.
            params: what :meth:`unmerged` gave.
            compute: float32 to merge, float64 to verify.
        """
        merged = {
            name: merge(value, item.changes[name], compute) if name in item.changes else value
            for name, value in params.items()
        }
        return self.base.layout.to_stored(item.slot, merged)

    def values(self, item: Item) -> dict[str, torch.Tensor]:
        """Return an item's stored tensors, rounded to the dtype that the plan gives them.

        Raises:
            ExportError: a merged value is not finite.
        """
        params = self.unmerged(item)
        untouched = params is None
        found = self.base.stored(item.slot, self.device) if params is None else self.exact(item, params, torch.float32)
        for info in item.values:
            shape = tuple(found[info.name].shape)
            if shape != info.shape:
                raise ExportError(
                    f"{info.name!r} came out with shape {shape} where {info.shape} was planned; this is an error in "
                    "fvlm_export, please report it."
                )
        rounded = {info.name: found[info.name].to(info.dtype) for info in item.values}
        if not untouched:
            for name, value in rounded.items():
                if not bool(torch.isfinite(value).all()):
                    raise ExportError(
                        f"merging {name!r} gives NaN or infinity in {value.dtype}; pass dtype=torch.bfloat16."
                    )
        return rounded

    def outputs(self, item: Item) -> dict[str, torch.Tensor]:
        """Return an item's tensors as they are written, on the CPU."""
        values = self.values(item)
        if len(item.outputs) == len(item.values):
            return {name: value.cpu() for name, value in values.items()}
        ((name, value),) = values.items()
        return nf4_tensors(name, value.to(self.device))

    def _source(self, item: Item) -> Slot:
        if item.copy_of is None:
            return item.slot
        return next(slot for slot in self.base.slots if item.copy_of in slot.params)

    def release(self, item: Item) -> None:
        """Say that an item is written."""
        self.base.release(self._source(item))


def _same_values(stored: torch.Tensor, live: torch.Tensor) -> bool:
    return stored.shape == live.shape and torch.equal(stored.to(live), live.detach())
