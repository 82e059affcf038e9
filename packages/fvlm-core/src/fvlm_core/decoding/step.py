"""One decoding step of a language model, recorded: token → embedding → layers → norm → head → logits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fvlm_core.decoding.cache import FixedCache
from fvlm_core.fused.cache import FIELD, NAMES
from fvlm_core.graphs.tape import Recorder, Tape

CARRIED = {"cross_attention_mask": 2, "full_text_row_masked_out_mask": 2}
"""Arguments of a language model that a decoding step takes over from the prompt's last token → their token axis."""
DROPPED = (
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", *NAMES),
    *("cross_attention_states", "visual_pos_masks", "deepstack_visual_embeds", "return_dict", "cache_position"),
)
"""Arguments that a step has its own of, or that concern the prompt's images alone."""
Autocast = torch.dtype | None


class StepError(Exception):
    """Why a step cannot be recorded after this prompt."""


class DecodingStep:
    """The step of one batch size, over fixed memory.

    Args:
        language: the language model without its head.
        head: the head.
        cache: the cache, which the prompt was read into.
        recorder: makes the recording.
        autocast: the dtype of autocast where it is on.
    """

    def __init__(
        self, language: Any, head: nn.Module, cache: FixedCache, recorder: Recorder, autocast: Autocast
    ) -> None:
        self._language, self._head, self.cache, self._recorder = language, head, cache, recorder
        self._autocast = autocast
        device = cache.filled.device
        self.ids = torch.zeros((cache.batch, 1), dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self._positions: Tensor | None = None
        self._carried: dict[str, Tensor] = {}
        self._mask = torch.zeros((cache.batch, 1, 1, 1), dtype=torch.bool, device=device)
        self._tape: Tape | None = None
        self._recorded_at: tuple[int, ...] = ()
        self.recordings = 0

    def load(self, prompt: Mapping[str, Any], logits: Tensor, position: int) -> None:
        """Take over what a prompt left.

        Args:
            prompt: the keyword arguments that the language model was called with.
            logits: of the last token, ``(batch, vocabulary)``.
            position: of the next token.

        Raises:
            StepError: the language model got something that a step has no rule for.
        """
        positions = prompt.get("position_ids")
        if not isinstance(positions, Tensor):
            raise StepError("the language model was given no positions")
        unknown = [n for n, v in prompt.items() if isinstance(v, Tensor) and n not in (*CARRIED, *DROPPED)]
        if unknown:
            raise StepError(f"the language model was given {unknown[0]}")
        carried = {n: prompt[n].narrow(axis, -1, 1) for n, axis in CARRIED.items() if prompt.get(n) is not None}
        self._positions = self._placed(self._positions, self._per_row(positions[..., -1:]) + 1)
        held = self._carried if set(self._carried) == set(carried) else {}
        self._carried = {n: self._placed(held.get(n), value) for n, value in carried.items()}
        self.logits = self._placed(self.logits, logits.float())
        if self._recorded_at != self.cache.places():
            self._tape = None
        self.cache.start_stepping(position)

    def _per_row(self, positions: Tensor) -> Tensor:
        return positions.expand(*positions.shape[:-2], self.cache.batch, 1)

    def _placed(self, room: Tensor | None, value: Tensor) -> Tensor:
        """Copy a value to the memory that it had before, or to new memory, for which a new recording is needed."""
        if room is None or room.shape != value.shape or room.dtype != value.dtype:
            self._tape = None
            return value.clone(memory_format=torch.contiguous_format)
        return room.copy_(value)

    def make_room(self, capacity: int) -> None:
        """Let the cache hold more tokens; what was recorded over the memory before is no longer right."""
        self.cache.grow(capacity)
        self._tape = None

    def run(self) -> None:
        """Compute the logits behind ``ids`` and go one position further."""
        if self._tape is None:
            self._record()
        if self._tape is None:
            raise RuntimeError("a step runs before it was recorded")
        self._tape.replay()

    def _record(self) -> None:
        positions = [self.cache.filled, self._positions]
        before = [t.clone() for t in positions if t is not None]
        self._recorder.warm_up(self._work)
        for tensor, value in zip((t for t in positions if t is not None), before, strict=True):
            tensor.copy_(value)
        self._tape, self._recorded_at = self._recorder.record(self._work), self.cache.places()
        self.recordings += 1

    def _work(self) -> None:
        logits, positions = self.logits, self._positions
        if logits is None or positions is None:
            raise RuntimeError("a step runs before it was loaded")
        casting: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            casting = torch.autocast(self.ids.device.type, self._autocast, cache_enabled=False)
        with torch.no_grad(), casting:
            hidden = self._language(
                inputs_embeds=self._language.get_input_embeddings()(self.ids),
                attention_mask=self._mask,  # a mask that is made already; the cache attends itself
                position_ids=positions,
                use_cache=True,
                **{FIELD: self.cache},
                **self._carried,
            ).last_hidden_state
            logits.copy_(self._head(hidden[:, -1]))
            self.cache.advance()
            positions.add_(1)
