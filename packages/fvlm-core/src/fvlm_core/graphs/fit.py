"""Which recordings a call of a layer fits: one of just its shape, and a longer one that it is padded to.

Text lengths and image sizes of real data hardly ever repeat, and recording every one of them would cost more than it
saves. So a call may also run in a recording of more tokens, where that is exact:

* causal layers: zeros behind the tokens are seen by none of them;
* text layers with a mask of tokens by tokens (Gemma 3's, whose image tokens see each other): the mask says the same;
* layers that attend within segments (images, windows, packed samples): zeros behind them are segments of their own.

There are eight lengths an octave, so that at most an eighth of the work, and a sixteenth on average, is for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fvlm_core.fused import CAUSAL_LAYER
from fvlm_core.fused.kinds import kind_of
from fvlm_core.fused.segments import PACKED_LONGEST, PACKED_STARTS
from fvlm_core.graphs.stage import Key, can_round_up, describe, is_square_mask
from fvlm_kernels.varlen_attention import has_flash

STEP = 64
"""Lengths are rounded up to a multiple of this at least."""
_SEGMENTED = {
    "vision_block": ("cu_seqlens", "max_seqlen"),
    "tower_block": ("segments", "longest"),
    CAUSAL_LAYER: (PACKED_STARTS, PACKED_LONGEST),
}
"""Kind of layer → its arguments: where segments start, and how long the longest one is."""
_TEXT = (CAUSAL_LAYER, "sandwich_layer")
"""Kinds of layers in which a token meets others in self-attention alone."""


@dataclass(frozen=True)
class Fit:
    """A recording that a call fits.

    Attributes:
        tokens: how long its token axis is.
        kwargs: the call's keyword arguments as the recording takes them.
        about: what of them the recording depends on; None: they are of a kind that cannot be recorded.
    """

    tokens: int
    kwargs: Mapping[str, Any]
    about: Key | None


def is_causal(module: nn.Module) -> bool:
    """Whether a layer is one whose tokens see no later ones, so that zeros behind them change nothing."""
    return kind_of(module) == CAUSAL_LAYER


def is_text(module: nn.Module) -> bool:
    """Whether a layer is one of a language model's that attends to its own tokens alone, by a mask or causally."""
    return kind_of(module) in _TEXT


def in_eighths(number: int, step: int = STEP) -> int:
    """Round up to one of eight numbers an octave, and to a multiple of ``step``, a power of two."""
    step = max(step, 1 << max(number.bit_length() - 4, 0))
    return -(-number // step) * step


class Fits:
    """Finds the recordings that calls fit; it keeps the segments that it padded last, which many layers share."""

    def __init__(self) -> None:
        self._padded: list[tuple[Tensor, int, int, Tensor]] = []

    def of(self, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any], dtype: torch.dtype) -> Iterator[Fit]:
        """Yield the fits of a call, the closest first.

        Args:
            module: the layer.
            hidden: the hidden state, ``(..., tokens, width)``.
            kwargs: the call's keyword arguments.
            dtype: what the layer's attention computes in.
        """
        tokens = hidden.shape[-2]
        masked = is_text(module) and any(is_square_mask(name, value, tokens) for name, value in kwargs.items())
        if (masked or is_causal(module)) and can_round_up(kwargs, tokens):
            about = describe(kwargs, tokens)
            close = -(-tokens // STEP) * STEP
            yield Fit(close, kwargs, about)
            if in_eighths(tokens) != close:
                yield Fit(in_eighths(tokens), kwargs, about)
            return
        names = _SEGMENTED.get(kind_of(module) or "")
        segments, longest = (kwargs.get(name) for name in names or ("", ""))
        if names is None or segments is None:
            yield Fit(tokens, kwargs, describe(kwargs, None))
            return
        known = isinstance(segments, Tensor) and isinstance(longest, int) and longest > 0
        free = _takes_any_segments(module, hidden, dtype)
        # One call serves images of one length; packed text is always cut by where its samples start.
        alike = known and kind_of(module) != CAUSAL_LAYER and (segments.numel() - 1) * longest == tokens
        if free or (alike and not _splits_on_the_host(module)):
            yield Fit(tokens, kwargs, describe(kwargs, None))
        if free and isinstance(segments, Tensor) and isinstance(longest, int) and longest > 0:
            yield self._in_segments(kwargs, names, tokens, longest)

    def _in_segments(self, kwargs: dict[str, Any], names: tuple[str, str], tokens: int, longest: int) -> Fit:
        length, longest = in_eighths(tokens), in_eighths(longest)
        segments = self._with_rest(kwargs[names[0]], tokens, length, longest)
        if (segments.numel() - 1) * longest == length:
            longest += 1  # else they would look like segments of one length
        changed = {**kwargs, names[0]: segments, names[1]: longest}
        single = tuple(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.numel() == 1)
        return Fit(length, changed, describe(changed, tokens, fixed=(names[0], *single)))

    def _with_rest(self, segments: Tensor, tokens: int, length: int, longest: int) -> Tensor:
        """Return the segments and more of them behind, none longer than ``longest``, that end at ``length``."""
        for known, known_length, known_longest, padded in self._padded:
            if known is segments and (known_length, known_longest) == (length, longest):
                return padded
        count = segments.numel() - 1 + -(-(length - tokens) // longest)
        more = in_eighths(count, 8) + 1 - segments.numel()
        ends = torch.arange(1, more + 1, dtype=segments.dtype, device=segments.device) * longest + tokens
        padded = torch.cat([segments, ends.clamp(max=length)])
        self._padded = [
            *self._padded[-1:],
            (segments, length, longest, padded),
        ]  # windows and whole images come in turns
        return padded


def _takes_any_segments(module: Any, hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether a layer's attention reads where segments lie on the device, so that they may change from call to call."""
    if _splits_on_the_host(module):
        return False
    return not hidden.is_cuda or has_flash(hidden.device, dtype)


def _splits_on_the_host(module: Any) -> bool:
    """Whether a layer's attention cuts its tokens into segments of lengths that the host reads, in every call."""
    return kind_of(module) == "vision_block" and "flash" not in (module.attn.config._attn_implementation or "")
