"""Keep saved tensors in pinned host memory between the forward and the backward pass.

Both copies run on a stream of their own, beside the layers' computation: the backward pass asks for the tensors in
reverse order, so that while it works on one layer the tensor of the layer before is already on its way. CPU tensors,
and small ones, stay where they are.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from collections.abc import Callable

# Below this size the copies cost more in launches than the memory is worth.
MIN_BYTES = 1 << 20


@dataclass(eq=False)
class _OnHost:
    copy: torch.Tensor  # pinned
    device: torch.device
    ready: torch.cuda.Event  # the copy is complete
    before: weakref.ref[_OnHost] | None  # of the same model, and wanted next after it
    back: torch.Tensor | None = None  # on the device again
    back_ready: torch.cuda.Event | None = None
    used: bool = False  # the backward pass has had it

    def fetch(self) -> None:
        """Start the way back."""
        if self.back is not None:
            return
        stream = _copy_stream(self.device)
        with torch.cuda.stream(stream):
            stream.wait_event(self.ready)
            self.back = torch.empty_like(self.copy, device=self.device, pin_memory=False)
            self.back.copy_(self.copy, non_blocking=True)
            self.back_ready = stream.record_event()


class Offloader:
    """What one model keeps in host memory between its two passes, in the order in which it is wanted back.

    Each model has one of its own: of two whose passes come in turns, neither calls for what the other is to have next.
    """

    def __init__(self) -> None:
        self._last: dict[torch.device, weakref.ref[_OnHost]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or stored model starts with nothing."""
        return Offloader, ()

    def one(self, tensor: torch.Tensor, min_bytes: int = MIN_BYTES) -> saved_tensors_hooks:
        """A context in which ``tensor``, if autograd saves it, waits for the backward pass in pinned host memory.

        Other tensors saved in the context are kept as they are, and so are integers, tensors that are not on a CUDA
        device, and tensors below ``min_bytes``. `torch.utils.checkpoint` pushes hooks of its own for what the layer
        computes, so around a checkpointed layer this sees the layer's inputs only.

        Args:
            tensor: any shape and dtype; its strides are kept where it is dense.
            min_bytes: the least size worth a copy.
        """
        worth = _worth(tensor, min_bytes)
        address, shape = tensor.data_ptr(), tensor.shape

        def pack(saved: torch.Tensor) -> torch.Tensor | _OnHost:
            if worth and saved.data_ptr() == address and saved.shape == shape:
                return self._moved(saved)
            return saved

        return saved_tensors_hooks(pack, _UNPACK)

    def every(self, min_bytes: int = MIN_BYTES) -> saved_tensors_hooks:
        """A context in which every tensor that autograd saves waits in pinned host memory, if it is worth a copy.

        Args:
            min_bytes: the least size worth a copy; integers and tensors that are not on a CUDA device never are.
        """

        def pack(saved: torch.Tensor) -> torch.Tensor | _OnHost:
            return self._moved(saved) if _worth(saved, min_bytes) else saved

        return saved_tensors_hooks(pack, _UNPACK)

    def _moved(self, tensor: torch.Tensor) -> _OnHost:
        packed = _to_host(tensor, self._last.get(tensor.device))
        self._last[tensor.device] = weakref.ref(packed)
        return packed


def _worth(tensor: torch.Tensor, min_bytes: int) -> bool:
    return tensor.is_cuda and tensor.is_floating_point() and tensor.numel() * tensor.element_size() >= min_bytes


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _to_host(tensor: torch.Tensor, before: weakref.ref[_OnHost] | None) -> _OnHost:
    tensor = tensor.detach()
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))  # the tensor may still be being written
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    with torch.cuda.stream(stream):
        copy.copy_(tensor, non_blocking=True)
        ready = stream.record_event()
    tensor.record_stream(stream)  # its memory is not reused before the copy has read it
    return _OnHost(copy, tensor.device, ready, before)


def _to_device(packed: torch.Tensor | _OnHost) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    packed.fetch()
    back, ready = packed.back, packed.back_ready
    if back is None or ready is None:
        raise RuntimeError("an offloaded tensor was not fetched")
    stream = torch.cuda.current_stream(packed.device)
    stream.wait_event(ready)
    back.record_stream(stream)
    packed.back = packed.back_ready = None  # a second backward pass over the same graph fetches it anew
    packed.used = True
    _fetch_next(packed)
    return back


def _fetch_next(packed: _OnHost) -> None:
    """Start the way back of one tensor that is wanted next: of as many as the layer has, each calls for one more."""
    earlier = packed
    while earlier.before is not None:
        found = earlier.before()
        if found is None:
            return
        earlier = found
        if not earlier.used and earlier.back is None:
            earlier.fetch()
            return


_UNPACK: Callable[[torch.Tensor | _OnHost], torch.Tensor] = _to_device
