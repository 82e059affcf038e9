"""What a recording reads in the place of a layer's trained parameters: leaves of its own.

On the parameters themselves hang hooks, which would act in the recording and once more on what it gives, and nodes that
DDP holds on the default stream, which no recording may wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fvlm_core.fused.adapted import Adapted, substituted
from fvlm_core.graphs.state import Copies, LayerState
from fvlm_kernels import LoRALinear


class Leaves:
    """The leaves of one layer.

    Every trained parameter has one over its own memory. The matrices of adapters have another one in autocast's dtype
    where that is not theirs: fused layers read those, so that they are cast once a pass, in one launch, instead of at
    each of their uses. Their gradients are rounded to that dtype either way.

    Args:
        state: the layer's state.
        dtype: autocast's, or None.
        copies: of adapters in that dtype.
    """

    def __init__(self, state: LayerState, dtype: torch.dtype | None, copies: Copies) -> None:
        self._trained = state.trained
        self._own = {id(p): nn.Parameter(p.detach()) for p in state.trained}
        self._cast: dict[int, Tensor] = {}
        self._sources: list[Tensor] = []
        self._substitutes: dict[nn.Module, Adapted] = {}
        self._places = [(held, name, p) for held, name, p in state.places if id(p) in self._own]
        for linear, one in state.pairs():
            self._substitutes[linear] = Adapted(self._read(one.layer, dtype, copies), one.compute_dtype, one.holds)

    def _read(self, layer: LoRALinear, dtype: torch.dtype | None, copies: Copies) -> LoRALinear:
        """Return a linear layer that reads the leaves."""
        a, b, bias = (None if p is None else self._own.get(id(p), p) for p in (layer.a, layer.b, layer.bias))
        if layer.a is not None and layer.b is not None and dtype is not None and layer.a.dtype != dtype:
            a, b = copies.of(layer.a, dtype), copies.of(layer.b, dtype)
            self._sources += [layer.a, layer.b]
            self._cast |= {id(layer.a): a, id(layer.b): b}
        return LoRALinear(layer.base, a, b, layer.scaling, bias, layer.dropout)

    def refresh(self) -> None:
        """Cast the adapters as they are now."""
        if self._sources:
            with torch.no_grad():
                torch._foreach_copy_([self._cast[id(p)] for p in self._sources], self._sources)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the layer reads its leaves, whether by fused layers or by modules' own code."""
        for held, name, p in self._places:
            held[name] = self._own[id(p)]
        try:
            with substituted(self._substitutes):
                yield
        finally:
            for held, name, p in self._places:
                held[name] = p

    @property
    def all(self) -> list[Tensor]:
        """Return the leaves of all trained parameters in their order, then the own ones of those that are cast."""
        first = [self._cast.get(id(p), self._own[id(p)]) for p in self._trained]
        return first + [self._own[id(p)] for p in self._trained if id(p) in self._cast]

    def merged(self, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradient of each trained parameter from those of all leaves: a layer reads one leaf of it."""
        apart = iter(found[len(self._trained) :])
        direct = [next(apart) if id(p) in self._cast else None for p in self._trained]
        return [second if first is None else first for first, second in zip(found, direct, strict=False)]
