"""What a benchmark of one op consists of: inputs, providers, and the least that must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

Provider = Callable[..., Any]
Inputs = dict[str, torch.Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the op's name, that of its file.
        name: the model and the place in it that the shape is from.
        make: builds fresh random inputs by name on a device, in the dtype measured.
        providers: functions of those inputs: ``torch`` (what the models run today) and ``fvlm`` always.
        wanted: the inputs that get a gradient; none for a forward-only case.
        reference: the function to check ``fvlm`` against before anything is timed; stays in float64 when given it.
        recorded: whether calls may be captured in a CUDA graph. bitsandbytes launches what quantizes and what steps on
            the default stream, where no capture can be, and ends the process if one is.
        checked: what to check in place of ``fvlm`` where that does not return numbers.
        forward_bytes: least traffic of a forward pass; 0 where ``forward_flops`` is the measure.
        backward_bytes: least traffic of a backward pass.
        forward_flops: floating-point operations of a forward pass, for ops bound by them.
        backward_flops: of a backward pass.
        together: time both passes as one in place of backward alone: where an op makes its gradient in the forward
            pass, or where what is to be reached is said of both.
        in_place: whether providers change their inputs, so that they are checked on copies.
    """

    op: str
    name: str
    make: Callable[[torch.device], Inputs]
    providers: dict[str, Provider]
    reference: Provider
    wanted: Sequence[str] = ()
    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    shape: dict[str, int] = field(default_factory=dict)
    together: bool = False
    in_place: bool = False
    recorded: bool = True
    checked: Provider | None = None

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed: ``"forward"`` without a gradient, and ``"backward"`` or ``"both"`` where there is one."""
        return ("forward", *(["both" if self.together else "backward"] if self.wanted else []))

    def bytes_of(self, mode: str) -> int:
        """Return the least traffic of one of the passes; 0 where operations are the measure."""
        return self.forward_bytes * (mode != "backward") + self.backward_bytes * (mode != "forward")

    def flops_of(self, mode: str) -> int:
        """Return the operations of one of the passes."""
        return self.forward_flops * (mode != "backward") + self.backward_flops * (mode != "forward")


def size(*shape: int, itemsize: int = 2) -> int:
    """Return the bytes of a tensor, by default of a 16-bit dtype."""
    total = itemsize
    for n in shape:
        total *= n
    return total


def normal(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Draw normal numbers on the device itself: the tensors are large."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


class Kept(Generic[T]):
    """What a layer makes of its tensors once, kept for the next call: as in a model, no call pays for it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[torch.Tensor, T]] = {}

    def __call__(self, tensor: torch.Tensor, make: Callable[[], T]) -> T:
        """Return what was made for ``tensor``, which is kept too, so that no other takes its identity; or make it."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = tensor, make()
        return self._made[id(tensor)][1]


def liger(name: str) -> Provider | None:
    """Return Liger's function of that name, or ``None`` where Liger is not installed or has none."""
    try:
        from liger_kernel.transformers import functional
    except ModuleNotFoundError:
        return None
    return getattr(functional, name, None)


def present(**providers: Provider | None) -> dict[str, Provider]:
    """Keep the providers that are there."""
    return {name: provider for name, provider in providers.items() if provider is not None}
