"""Layers that no recording serves, and that keep what they compute all the same, as far as there is room.

Layers in 8 bit, layers trained whole, DoRA, dropout: they run as they are. Autograd holds what such a layer computes
from its forward pass to its backward pass and no longer, so that what each call may keep is decided anew, by what is
free at that moment, and what one call kept is known only after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fvlm_core.graphs.room import Room
from fvlm_core.graphs.state import LayerState
from fvlm_core.repeat import RandomState

logger = logging.getLogger(__name__)


class Unrecorded:
    """Decides call by call whether a layer that runs as it is keeps what it computes.

    Args:
        budget: GiB of device memory; see `Room`.
        anywhere: whether layers on a CPU do so too, each counting for 1 MiB; for tests.
    """

    def __init__(self, budget: float | None = None, anywhere: bool = False) -> None:
        self._room, self._anywhere = Room(budget), anywhere
        self._reasons: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._held: dict[type[nn.Module], list[int]] = {}
        self._most_held = 0
        self._told: set[tuple[type[nn.Module], bool]] = set()

    @property
    def holds(self) -> bool:
        """Whether anything was kept since memory last ran out."""
        return self._most_held > 0

    @property
    def may_hold(self) -> bool:
        """Whether anything may be kept."""
        return self._room.most > 0

    def note(self, module: nn.Module, reason: str | None) -> None:
        """Take note of why a layer cannot be recorded now; None: it can."""
        self._reasons[module] = reason

    def run(self, module: nn.Module | None, layer: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a layer that cannot be recorded so that its backward pass computes nothing again.

        Args:
            module: whose call it is.
            layer: the call.
            args: its positional arguments, the hidden state first.

        Returns:
            What the layer returned; None where there is no room, or the layer is one to be recorded: it was not run.
        """
        hidden = args[0] if args else None
        if module is None or not isinstance(hidden, Tensor) or not (hidden.is_cuda or self._anywhere):
            return None
        if torch.compiler.is_compiling():
            return None
        if module not in self._reasons:
            self.note(module, LayerState(module).reason)
        why = self._reasons[module]
        if why is None:
            return None
        kind, key = type(module), (type(module), hidden.shape, hidden.dtype)
        # A layer that is trained whole gets gradients of its own size, while others still keep what they computed.
        trained = sum(p.nbytes for p in module.parameters() if p.requires_grad and p.grad is None)
        self._room.kept_bytes = sum(map(sum, self._held.values()))
        if not self._room.has_for(self._sizes.get(key, 0), hidden.device, beside=trained):
            return self._tell(kind, why, hidden.device, keeps=False)
        start = RandomState({hidden.device})
        before = self._room.allocated(hidden.device)
        try:
            out = layer(*args)
        except torch.OutOfMemoryError:
            self._room.close()
        else:
            size = self._room.taken_since(before, hidden.device)
            self._sizes[key] = max(size, self._sizes.get(key, 0))
            self._hold(kind, out, size)
            self._tell(kind, why, hidden.device, keeps=True)
            return out
        start.restore()
        return self._tell(kind, why, hidden.device, keeps=False)

    def _hold(self, kind: type[nn.Module], out: Any, size: int) -> None:
        """Count what a call keeps until its backward pass begins, or its result is gone."""
        result = out[0] if isinstance(out, tuple) else out
        if not isinstance(result, Tensor) or not result.requires_grad:
            return
        result.register_hook(_Held(self._held.setdefault(kind, []), size))
        self._most_held = max(self._most_held, sum(map(sum, self._held.values())))

    def lower(self) -> bool:
        """Let layers keep half of what they kept at most, at last nothing, since memory ran out.

        What they keep now is free when the pass that it belongs to is given up.

        Returns:
            Whether they kept anything.
        """
        if not self.holds:
            return False
        most = self._room.kept_bytes = self._most_held
        self._room.lower()
        self._most_held = 0
        logger.warning(
            "Memory ran out while layers that are not recorded kept up to %.2f GiB: at most %.2f GiB from now on.",
            most / 2**30,
            self._room.most / 2**30,
        )
        return True

    def _tell(self, kind: type[nn.Module], why: str, device: torch.device, keeps: bool) -> None:
        if (kind, keeps) in self._told:
            return
        self._told.add((kind, keeps))
        if keeps:
            logger.info("%s runs without recordings (%s), and keeps what it computes while there is room.",
                        kind.__name__, why)  # fmt: skip
        else:
            logger.info("No room for more than %d kept layers of %s, not recorded (%s): others compute again (%s).",
                        len(self._held.get(kind, ())), kind.__name__, why, self._room.describe(device))  # fmt: skip


class _Held:
    """Bytes that a call keeps; a hook on its result, which goes with the result where no backward pass comes."""

    def __init__(self, held: list[int], size: int) -> None:
        self._held, self._size = held, size
        held.append(size)

    def __call__(self, gradient: Tensor) -> None:
        """Let go: the call's backward pass begins."""
        self._let_go()

    def __del__(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._size:
            self._held.remove(self._size)
            self._size = 0
