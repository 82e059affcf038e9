"""Keys and values at a fixed place: filled by the prompt's ordinary forward pass, then one token a row at a time.

While the prompt is read, the cache does what transformers' dynamic one does: it hands back the keys and values that it
is given, so that masks and attention are stock's own, and copies them to their place. While stepping, positions and
lengths are read on the device, so that one recording serves every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from fvlm_core.decoding.stepping import STEPPING
from fvlm_kernels import decode_attention


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Args:
        capacity: columns; None for as many as the prompt brings, as in cross attention to an image.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, capacity: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0
        self.steps = False
        self.new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for states of this batch, dtype and device."""
        columns = key_states.shape[2] if self.capacity is None else self.capacity
        self.keys = key_states.new_zeros((*key_states.shape[:2], columns, key_states.shape[3]))
        self.values = value_states.new_zeros((*value_states.shape[:2], columns, value_states.shape[3]))
        self.is_initialized = True

    def _fits(self, states: Tensor) -> bool:
        keys = self.keys
        if keys is None or keys.dtype != states.dtype or keys.device != states.device:
            return False
        exact = self.capacity is None
        columns = keys.shape[2] == states.shape[2] if exact else keys.shape[2] == self.capacity
        return keys.shape[:2] == states.shape[:2] and columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep states ``(batch, heads, tokens, head_dim)``; return those that attention sees.

        Raises:
            RuntimeError: the prompt comes in several parts, or is longer than the capacity.
        """
        if self.steps:
            self.new = key_states.squeeze(2), value_states.squeeze(2)  # `FixedCache.attend` puts them to the others
            return key_states, value_states
        if self.length:
            raise RuntimeError("a fixed cache is filled by one forward pass, and a second one came")
        if not self._fits(key_states):
            self.lazy_initialization(key_states, value_states)
        self.length, self.is_initialized = key_states.shape[2], True
        for room, states in zip(self.held(), (key_states, value_states), strict=True):
            room[:, :, : self.length].copy_(states)
        return key_states, value_states

    def held(self) -> tuple[Tensor, Tensor]:
        """Return all memory for keys and for values, ``(batch, heads, capacity, head_dim)``.

        Raises:
            RuntimeError: nothing has come yet.
        """
        if self.keys is None or self.values is None:
            raise RuntimeError("a layer's cache is read before anything was kept in it")
        return self.keys, self.values

    def grow(self, capacity: int) -> None:
        """Move what is held to larger memory."""
        if self.capacity is None or not self.is_initialized:
            return
        old = self.held()
        self.capacity = capacity
        self.lazy_initialization(*old)
        for new, before in zip(self.held(), old, strict=True):
            new[:, :, : before.shape[2]].copy_(before)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask has, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens the prompt had."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1, as transformers' growing caches do: it grows too."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1; the older name of `get_max_length`."""
        return -1


class FixedCache(Cache):
    """Keys and values of a language model for one batch size.

    Args:
        crossing: for each layer, whether it attends to images instead of the text.
        batch: rows.
        capacity: tokens that a row may have.
        device: where it lies.
    """

    def __init__(self, crossing: list[bool], batch: int, capacity: int, device: torch.device) -> None:
        self._fixed = [FixedLayer(None if across else capacity) for across in crossing]
        super().__init__(layers=list(self._fixed))
        self.batch, self.capacity, self._device = batch, capacity, device
        self.filled = torch.zeros(1, dtype=torch.int64, device=device)
        self.visible = torch.ones((batch, capacity), dtype=torch.bool, device=device)
        self._whole: dict[int, Tensor] = {}
        vars(self)[STEPPING] = False

    def begin(self, mask: Tensor | None, prompt: int, capacity: int) -> None:
        """Make room for a new prompt.

        Args:
            mask: ``(batch, prompt)``, 0 for padding, or None.
            prompt: its length in tokens.
            capacity: how many tokens a row must hold at least; below that, what is there is used.
        """
        vars(self)[STEPPING] = False
        if capacity > self.capacity:
            self._resize(capacity)
        for layer in self._fixed:
            layer.steps, layer.length = False, 0
            layer.is_initialized = False  # what is left of an earlier prompt is not to be seen; its memory stays
            if layer.capacity is not None and layer.capacity != self.capacity:
                layer.capacity = self.capacity
        self.visible.fill_(True)
        if mask is not None:
            self.visible[:, :prompt].copy_(mask)

    def start_stepping(self, position: int) -> None:
        """Decode from here on, the next token being at a position (columns before it are filled)."""
        self.filled.fill_(position + 1)
        vars(self)[STEPPING] = True
        for layer in self._fixed:
            layer.steps = True

    def advance(self) -> None:
        """Go one position further; part of what is recorded."""
        self.filled += 1

    def grow(self, capacity: int) -> None:
        """Move everything to larger memory."""
        self._resize(capacity)
        for layer in self._fixed:
            layer.grow(capacity)

    def _resize(self, capacity: int) -> None:
        visible = self.visible.new_ones((self.batch, capacity))
        visible[:, : self.capacity].copy_(self.visible)
        self.capacity, self.visible = capacity, visible

    def places(self) -> tuple[int, ...]:
        """Return where everything lies; a recording serves while this stays the same."""
        held = [t for layer in self._fixed if layer.is_initialized for t in layer.held()]
        return (self.visible.data_ptr(), *(t.data_ptr() for t in held), *(layer.length > 0 for layer in self._fixed))

    def attend(self, q: Tensor, layer: int, scale: float, window: int | None) -> Tensor:
        """Keep the token's key and value, and attend from one token a row to what is filled.

        Args:
            q: ``(batch, heads, 1, head_dim)``.
            layer: its number.
            scale: what scores are multiplied by.
            window: how many of the last columns are seen, or None.

        Returns:
            ``(batch, 1, heads, head_dim)``.
        """
        own = self._fixed[layer]
        y = decode_attention(
            q.squeeze(2), *own.held(), self.filled, new=own.new, visible=self.visible, window=window, scale=scale
        )
        return y.unsqueeze(1)

    def attend_across(self, q: Tensor, layer: int, scale: float, mask: Tensor | None) -> Tensor:
        """Attend from one token a row to images; ``mask`` is additive, ``(batch, 1, 1, columns)``, or None."""
        held = self._fixed[layer].held()
        columns = held[0].shape[2]
        if columns not in self._whole:
            self._whole[columns] = torch.full((1,), columns, dtype=torch.int64, device=q.device)
        visible = None if mask is None else (mask == 0).expand(q.shape[0], 1, 1, columns)[:, 0, 0]
        y = decode_attention(q.squeeze(2), *held, self._whole[columns], visible=visible, scale=scale)
        return y.unsqueeze(1)

    def as_dynamic(self, config: Any, length: int) -> DynamicCache:
        """Return a copy of the first ``length`` tokens in the form that ``generate`` returns."""
        copy = DynamicCache(config=config)
        for index, layer in enumerate(self._fixed):
            if layer.length:
                columns = layer.length if layer.capacity is None else length
                keys, values = (room[:, :, :columns].clone() for room in layer.held())
                copy.update(keys, values, index)
        return copy
