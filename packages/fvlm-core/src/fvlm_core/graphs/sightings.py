"""Which shapes came to a layer, and which of them are worth a recording."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

from fvlm_core.graphs.fit import Fit
from fvlm_core.graphs.stage import Key

_MOST_SEEN = 1024
"""How many shapes that came are counted of a layer before the count starts anew."""
OFTEN = 8
"""How often a shape comes in a longer recording before it may get one of its own."""


class Sightings:
    """Counts what came to each layer."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[nn.Module, Counter[Key]] = WeakKeyDictionary()
        self._varied: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        """How many recordings of longer shapes than its own a layer got."""

    def forget(self, key: Key) -> None:
        """Let a shape have come to no layer yet."""
        for seen in self._seen.values():
            seen.pop(key, None)

    def _counted(self, module: nn.Module, *keys: Key) -> Counter[Key]:
        """Count a call of a layer by what it fits; return the layer's counts."""
        seen = self._seen.setdefault(module, Counter())
        if len(seen) > _MOST_SEEN:  # shapes that never repeat
            seen.clear()
        seen.update(keys)
        return seen

    def outgrown(self, module: nn.Module, found: Sequence[tuple[Key, Fit]]) -> bool:
        """Count a call that runs in a longer recording; tell whether its own shape has come to be most of those."""
        (close, _), (wide, _) = found
        seen = self._counted(module, close, wide)
        return seen[close] > OFTEN and 2 * seen[close] > seen[wide]

    def worth_recording(self, module: nn.Module, found: Sequence[tuple[Key, Fit]]) -> tuple[Key, Fit] | None:
        """Count a call; return which of the recordings that it fits is to be made now, or None for none.

        A shape is recorded when it comes for the second time; a close one, rather than the longer one that others fit
        as well, if most of those that fit the longer one are of it. A layer that has come to need longer ones gets the
        next of them at first sight.
        """
        seen = self._counted(module, *(key for key, _ in found))
        if not found:
            return None
        (close, fit), (wide, other) = found[0], found[-1]
        if seen[close] > 1 and 2 * seen[close] > seen[wide]:
            return close, fit
        if seen[wide] > 1 or (wide != close and self._varied.get(module, 0) > 1):
            self._varied[module] = self._varied.get(module, 0) + (wide != close)
            return wide, other
        return None
