"""What an adapter is merged onto: a checkpoint's files, or the weights of a live model.

Both give the same three things: the slots to write, in order; each stored tensor's dtype and shape, known before
anything is computed; and the values, one slot at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fvlm_core.errors import CheckpointError, ExportError
from fvlm_export import quantized
from fvlm_export.layout import Layout, Slot
from fvlm_export.quantized import RoundTrip
from fvlm_export.remote import Shard
from fvlm_export.safetensor_file import SafetensorFile, TensorInfo
from fvlm_export.skeleton import Skeleton
from fvlm_export.staging import Upload

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Base(Protocol):
    """Where unmerged weights come from."""

    layout: Layout
    slots: list[Slot]
    infos: dict[str, TensorInfo]  # stored name → what it is as floating point

    def params(self, slot: Slot, device: torch.device) -> dict[str, torch.Tensor]:
        """Return a slot's parameters, in floating point."""

    def stored(self, slot: Slot, device: torch.device) -> dict[str, torch.Tensor]:
        """Return a slot's stored tensors as they are, in floating point; those of a file keep their bytes."""

    def file_of(self, name: str) -> Shard | None:
        """Return the file that holds a stored tensor's very bytes; None: there is none, or it is quantized there."""

    def prefetch(self, slot: Slot) -> None:
        """Say that a slot's values will be needed soon."""

    def release(self, slot: Slot) -> None:
        """Say that a slot's values are no longer needed."""


class CheckpointBase:
    """A checkpoint's safetensors files, read tensor by tensor; quantized weights come back dequantized.

    Args:
        shards: its files, in order.
        skeleton: of its model.
        conversions: see :meth:`Layout.of_checkpoint`.
        default_dtype: of int8 weights, which record none.
        resized: parameters that a live model replaces, so that their stored shape need not be the model's.
        through: how a quantized load holds the weights, to hand them out so; None: as they are stored.

    Raises:
        CheckpointError: a shard is torn, a tensor lies in two shards, or a parameter is missing or of another shape.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        skeleton: Skeleton,
        conversions: list[Any] | None,
        default_dtype: torch.dtype,
        resized: Container[str] = (),
        through: RoundTrip | None = None,
    ) -> None:
        self.shards, self._through, self._upload = list(shards), through, Upload()
        self._home: dict[str, Shard] = {}
        for file in shards:
            for name in file.infos:
                if name in self._home:
                    raise CheckpointError(
                        f"tensor {name!r} lies in both {self._home[name].path} and {file.path}; remove one."
                    )
                self._home[name] = file
        self.quantized = quantized.companions(self._home)
        parts = {name for members in self.quantized.values() for name in members}
        names = [name for name in self._home if name not in parts]
        with ThreadPoolExecutor(8) as pool:  # of shards on the Hub, each state is a request of its own
            found = list(pool.map(lambda name: self._info(name, default_dtype), names))
        self.infos = dict(zip(names, found, strict=True))
        self.layout, self.slots = Layout.of_checkpoint(
            skeleton, {name: info.shape for name, info in self.infos.items()}, conversions
        )
        for slot in self.slots:
            if not any(param in resized for param in slot.params):
                self._check_shape(slot, skeleton)
        self._rounded = self._names_through(through) if through is not None else frozenset()

    def _names_through(self, through: RoundTrip) -> frozenset[str]:
        names = {slot.params[0]: slot.stored[0] for slot in self.slots if slot.conversion is None and slot.params}
        unknown = sorted(through.params - names.keys())
        if unknown:
            raise CheckpointError(f"{unknown[0]!r} was quantized in training, and the base does not hold it as it is.")
        return frozenset(names[param] for param in through.params)

    def _info(self, name: str, default: torch.dtype) -> TensorInfo:
        info = self._home[name].infos[name]
        if name not in self.quantized:
            if self._through is None or not info.dtype.is_floating_point:
                return info
            return TensorInfo(name, self._through.dtype, info.shape)
        state = quantized.state_name(self.quantized[name])
        return quantized.dequantized_info(info, None if state is None else self._home[state].small(state), default)

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        return {part: self._home[part].tensor(part) for part in self.quantized[name]}

    def _check_shape(self, slot: Slot, skeleton: Skeleton) -> None:
        if slot.conversion is None and slot.params:
            stored, wanted = self.infos[slot.stored[0]].shape, skeleton.shapes[slot.params[0]]
            if stored != wanted:
                raise CheckpointError(
                    f"{self._home[slot.stored[0]].path} holds {slot.stored[0]!r} with shape {stored}, where the "
                    f"model's config asks for {wanted}; use the base that belongs to this config."
                )

    def stored(self, slot: Slot, device: torch.device) -> dict[str, torch.Tensor]:
        """See :class:`Base`."""
        return {name: self._value(name, device) for name in slot.stored}

    def _value(self, name: str, device: torch.device) -> torch.Tensor:
        home = self._home[name]
        if name not in self.quantized and device.type == "cuda":
            value = self._upload(home, name, device)
        else:
            value = home.tensor(name)
        if name in self.quantized:
            info = self.infos[name]
            return quantized.dequantize(value, self._parts(name), device).to(info.dtype).reshape(info.shape)
        if name in self._rounded and self._through is not None:
            value = self._through(value.to(device))
        return value.to(self.infos[name].dtype)

    def params(self, slot: Slot, device: torch.device) -> dict[str, torch.Tensor]:
        """See :class:`Base`."""
        stored = {name: value.to(device) for name, value in self.stored(slot, device).items()}
        return self.layout.to_params(slot, stored)

    def keep(self, slots: Iterable[Slot]) -> None:
        """Say that only these slots will be needed from now on; shards from the Hub that hold no others are deleted."""
        names = {name for slot in slots for name in slot.stored}
        names |= {part for name in names for part in self.quantized.get(name, ())}
        needed = {id(self._home[name]) for name in names}
        for shard in self.shards:
            if id(shard) not in needed:
                shard.drop()

    def file_of(self, name: str) -> Shard | None:
        """See :class:`Base`."""
        home = self._home[name]
        return home if home.infos[name] == self.infos[name] and name not in self._rounded else None

    def prefetch(self, slot: Slot) -> None:
        """See :class:`Base`."""
        for name in slot.stored:
            self._home[name].prefetch(name)

    def release(self, slot: Slot) -> None:
        """See :class:`Base`."""
        for name in slot.stored:
            self._home[name].release(name)

    @property
    def fetched_at_most(self) -> int:
        """How many bytes of shards from the Hub may lie on the disk at once: two shards."""
        sizes = [
            sum(info.nbytes for info in s.infos.values()) for s in self.shards if not isinstance(s, SafetensorFile)
        ]
        return sum(sorted(sizes)[-2:])

    @property
    def at_hand(self) -> bool:
        """Whether every shard is a file that stays, so that tensors of many may be wanted at once."""
        return all(isinstance(shard, SafetensorFile) for shard in self.shards)


class LiveBase:
    """The base weights that a model in memory computes with, under the names that transformers would save them with.

    Args:
        model: the base model, with or without PEFT's layers in it.
        tensors: its parameters and persistent buffers by the names of the model without PEFT.
        modules: its quantized modules by the same names.
        skeleton: of the model.
        default_dtype: of int8 weights, which record none.

    Raises:
        ExportError: a weight is not in memory (offloaded to disk or to another process).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: dict[str, torch.Tensor],
        modules: dict[str, torch.nn.Module],
        skeleton: Skeleton,
        default_dtype: torch.dtype,
    ) -> None:
        self._tensors, self._modules, self._default = tensors, modules, default_dtype
        for name, tensor in tensors.items():
            if tensor.device.type == "meta":
                raise ExportError(
                    f"{name!r} is offloaded and cannot be read from the model; load it with device_map='cpu', or pass "
                    "the adapter's folder."
                )
        names = [name for name in tensors if skeleton.tied.get(name) not in tensors]
        self.layout, self.slots = Layout.of_model(skeleton, model, names)
        self.infos = {info.name: info for slot in self.slots for info in self._stored_infos(slot)}

    def _stored_infos(self, slot: Slot) -> Iterable[TensorInfo]:
        empty = {p: torch.empty(self._shape(p), dtype=self._dtype(p), device="meta") for p in slot.params}
        for name, value in self.layout.to_stored(slot, empty).items():
            yield TensorInfo(name, value.dtype, tuple(value.shape))

    def _module(self, param: str) -> torch.nn.Module | None:
        return self._modules.get(param.removesuffix(".weight")) if param.endswith(".weight") else None

    def _shape(self, param: str) -> tuple[int, ...]:
        module = self._module(param)
        return quantized.live_shape(module) if module is not None else tuple(self._tensors[param].shape)

    def _dtype(self, param: str) -> torch.dtype:
        module = self._module(param)
        return quantized.live_dtype(module, self._default) if module is not None else self._tensors[param].dtype

    def params(self, slot: Slot, device: torch.device) -> dict[str, torch.Tensor]:
        """See :class:`Base`."""
        return {param: self._value(param) for param in slot.params}

    def _value(self, param: str) -> torch.Tensor:
        module = self._module(param)
        if module is None:
            return self._tensors[param].detach()
        return quantized.dequantize_live(module).to(self._dtype(param))

    def stored(self, slot: Slot, device: torch.device) -> dict[str, torch.Tensor]:
        """See :class:`Base`."""
        return self.layout.to_stored(slot, self.params(slot, device))

    def file_of(self, name: str) -> Shard | None:
        """See :class:`Base`."""
        return None

    def prefetch(self, slot: Slot) -> None:
        """See :class:`Base`; nothing: it is in memory."""

    def release(self, slot: Slot) -> None:
        """See :class:`Base`."""
