"""Which tensors of a checkpoint are which parameters of the model.

Checkpoints keep the names of the day they were made (``visual.blocks…``, ``model.layers…``, one tensor per expert),
while the modules have moved on (``model.visual.blocks…``, ``model.language_model.layers…``, experts stacked).
transformers knows both and converts while loading and back while saving; this module asks it, so that a merged
checkpoint keeps the names of its base and every adapter finds its tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from fvlm_core.errors import CheckpointError, ExportError
from fvlm_export.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Slot:
    """Stored tensors and the parameters that they hold: one each, unless the model keeps them in another form.

    Attributes:
        stored: names in the checkpoint.
        params: names in the module tree; empty for a stored tensor that the model does not load.
        conversion: how stored tensors become parameters; None: the one tensor is the one parameter, unchanged.
        sources: stored name → the pattern of the conversion that it matched.
        shapes: stored name → its shape, where a checkpoint holds it in another form than the model.
    """

    stored: tuple[str, ...]
    params: tuple[str, ...]
    conversion: WeightConverter | None = None
    sources: Mapping[str, str] | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None


class Layout:
    """Translates between stored tensors and parameters.

    Args:
        skeleton: the model.
        conversions: transformers' conversions of this model, in loading order, as far as this checkpoint needs them.
    """

    def __init__(self, skeleton: Skeleton, conversions: list[Any]) -> None:
        self.skeleton = skeleton
        self._conversions = conversions
        self._renamings: list[WeightRenaming] | None = None
        # revert_weight_conversion reads the conversions off the model, as after a real load
        skeleton.model.__dict__["_weight_conversions"] = conversions

    @classmethod
    def of_checkpoint(
        cls, skeleton: Skeleton, stored: Mapping[str, tuple[int, ...]], conversions: list[Any] | None = None
    ) -> tuple[Layout, list[Slot]]:
        """Find each stored tensor's place, in the order given.

        Args:
            skeleton: the model.
            stored: every name in the checkpoint, with its shape.
            conversions: those that a live model was loaded through; None: those that transformers knows for the model.

        Raises:
            CheckpointError: the checkpoint lacks a parameter of the model.
        """
        mapping = get_model_conversion_mapping(skeleton.model) if conversions is None else copy.deepcopy(conversions)
        slots = _place(skeleton, stored, mapping)
        held = {param for slot in slots for param in slot.params}
        missing = sorted(p for p in skeleton.parameters if p not in held and skeleton.tied.get(p) not in held)
        if missing:
            raise CheckpointError(
                f"the base checkpoint lacks {len(missing)} parameters of {type(skeleton.model).__name__}, the first is "
                f"{missing[0]!r}; use the base that the adapter was trained on."
            )
        return cls(skeleton, [conversion for conversion in mapping if conversion.was_used()]), slots

    @classmethod
    def of_model(cls, skeleton: Skeleton, model: PreTrainedModel, params: Iterable[str]) -> tuple[Layout, list[Slot]]:
        """Find the names under which a live model's parameters are stored, as transformers itself would save them."""
        layout = cls(skeleton, conversions_of(skeleton, model))
        reverse = [conversion.reverse_transform() for conversion in layout._conversions[::-1]]
        renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
        groups: dict[tuple[str, bool], list[str]] = {}
        for param in params:
            stored, pattern = rename_source_key(param, renamings, converters, reverse=True)
            groups.setdefault((stored, pattern is not None), []).append(param)
        slots = []
        for (stored, converted), members in groups.items():
            if not converted:
                slots.append(Slot((stored,), tuple(members)))
                continue
            empty = {m: torch.empty(skeleton.shapes[m], device="meta") for m in members}
            names = revert_weight_conversion(skeleton.model, empty)
            slots.append(Slot(tuple(names), tuple(members), converters[0]))
        return layout, slots

    def to_params(self, slot: Slot, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Turn a slot's stored tensors into the model's parameters."""
        if slot.conversion is None or slot.sources is None:
            return {slot.params[0]: stored[slot.stored[0]]}
        conversion = copy.deepcopy(slot.conversion)
        for name in slot.stored:
            # while saving, transformers collects tensors here; while loading, futures, which is what it declares
            conversion.add_tensor(slot.params[0], name, slot.sources[name], cast(Any, stored[name]))
        done = conversion.convert(slot.params[0], model=self.skeleton.model, config=self.skeleton.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in done.items()}

    def to_stored(self, slot: Slot, params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Turn a slot's parameters back into what the checkpoint holds.

        Raises:
            ExportError: transformers' conversion does not lead back to the names that the checkpoint uses.
        """
        if slot.conversion is None:
            return {slot.stored[0]: params[slot.params[0]]}
        stored = revert_weight_conversion(self.skeleton.model, {name: params[name] for name in slot.params})
        if set(stored) != set(slot.stored):
            raise ExportError(
                f"the stored form of {slot.params[0]!r} cannot be rebuilt: transformers leads back to "
                f"{sorted(stored)[0]!r}, the checkpoint has {slot.stored[0]!r}; merge from the live model instead."
            )
        return {name: _as_stored(slot, name, stored[name]) for name in slot.stored}

    def stored_name(self, param: str) -> str:
        """Return the name under which a parameter that the checkpoint lacks (a tied one) is stored."""
        empty = torch.empty(self.skeleton.shapes[param], device="meta")
        (name,) = revert_weight_conversion(self.skeleton.model, {param: empty})
        return str(name)

    def param_named(self, key: str) -> str:
        """Return today's module name of a parameter that may be under an older name; unknown names come back as is."""
        if key in self.skeleton.shapes:
            return key
        if self._renamings is None:
            mapping = get_model_conversion_mapping(self.skeleton.model)
            self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        renamed, _ = rename_source_key(
            key, self._renamings, [], self.skeleton.model.base_model_prefix, self.skeleton.shapes
        )
        return renamed if renamed in self.skeleton.shapes else key


def _place(skeleton: Skeleton, stored: Mapping[str, tuple[int, ...]], mapping: list[Any]) -> list[Slot]:
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, shapes = skeleton.model.base_model_prefix, skeleton.shapes
    places: dict[str, tuple[str, str | None]] = {}
    for name in sorted(stored, key=dot_natural_key):  # some renamings depend on the order in which transformers asks
        param, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if param not in shapes and name in shapes:
            param, pattern = name, None
        places[name] = (param, pattern)
    groups: dict[str, list[str]] = {}
    for name in stored:
        groups.setdefault(places[name][0], []).append(name)
    slots: list[Slot] = []
    for param, members in groups.items():
        members.sort(key=dot_natural_key)
        sources = {name: pattern for name in members if (pattern := places[name][1]) is not None}
        if param not in shapes:
            slots.extend(Slot((name,), ()) for name in members)  # e.g. rotary tables of old checkpoints: kept, unused
        elif not sources and len(members) > 1:
            raise CheckpointError(
                f"the base checkpoint holds {param!r} twice, as {members[0]!r} and {members[1]!r}; remove one of them."
            )
        elif not sources:
            slots.append(Slot((members[0],), (param,)))
        else:
            conversion = by_pattern[sources[members[0]]]
            forms = {name: stored[name] for name in members}
            slots.append(Slot(tuple(members), _targets(param, conversion), conversion, sources, forms))
    return slots


def _as_stored(slot: Slot, name: str, value: torch.Tensor) -> torch.Tensor:
    """Give a tensor the shape it has in the checkpoint.

    Where transformers accepts a tensor and its transpose alike (stacked experts), it saves the model's own orientation;
    the checkpoint's is kept here, because other readers know only that one.
    """
    wanted = None if slot.shapes is None else slot.shapes[name]
    if wanted is None or tuple(value.shape) == wanted:
        return value
    operations: list[Any] = [] if slot.conversion is None else slot.conversion.operations[::-1]
    turns = [operation for operation in operations if isinstance(operation, Transpose)]
    if len(turns) == len(operations):
        for turn in turns:
            value = value.transpose(turn.dim0, turn.dim1)
    if tuple(value.shape) != wanted:
        raise ExportError(
            f"the stored form of {name!r} cannot be rebuilt: it has shape {wanted} and transformers gives "
            f"{tuple(value.shape)}; merge from the live model instead."
        )
    return value.contiguous()


def _targets(first: str, conversion: WeightConverter) -> tuple[str, ...]:
    head = conversion.target_patterns[0]
    return tuple(first.replace(head, target) for target in conversion.target_patterns)


def conversions_of(skeleton: Skeleton, model: PreTrainedModel) -> list[Any]:
    """Return the conversions that a live model was loaded through, without those of its quantizer."""
    loaded = model.__dict__.get("_weight_conversions")
    if loaded is not None:
        return [entry for entry in loaded if not _of_quantizer(entry)]
    # Built from a config, never loaded: transformers' own rule for saving such a model, which leaves prefixes alone
    mapping = get_model_conversion_mapping(skeleton.model, add_legacy=False)
    return [entry for entry in mapping if not isinstance(entry, PrefixChange)]


def _of_quantizer(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and any("hf_quantizer" in vars(op) for op in entry.operations)
