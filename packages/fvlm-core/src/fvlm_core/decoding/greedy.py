"""Choosing the likeliest token on the device, and noticing there that all rows have ended: one recording."""

from __future__ import annotations

import torch
from torch import Tensor

from fvlm_core.decoding.step import DecodingStep
from fvlm_core.graphs.tape import Recorder, Tape


class GreedyChoice:
    """What stock's greedy loop does between two forward passes, over fixed memory.

    Args:
        step: whose logits are read, and whose next token is written.
        columns: how long rows may become, prompt included.
        forbidden: ``(n,)`` int64, the tokens that may not come before ``least`` tokens are there; None: none.
        ends: ``(n,)`` int64, the tokens that end a row; None: rows do not end.
        pad: what ended rows are continued with.
    """

    def __init__(
        self, step: DecodingStep, columns: int, forbidden: Tensor | None, ends: Tensor | None, pad: Tensor | None
    ) -> None:
        device, batch = step.ids.device, step.ids.shape[0]
        self._step, self._forbidden, self._ends, self._pad = step, forbidden, ends, pad
        self.rows = torch.zeros((batch, columns), dtype=torch.int64, device=device)
        self.all_ended = torch.zeros(1, dtype=torch.bool, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._least = torch.zeros(1, dtype=torch.int64, device=device)
        self._open = torch.ones(batch, dtype=torch.bool, device=device)
        self._tape: Tape | None = None

    def serves(self, step: DecodingStep, columns: int, *tensors: Tensor | None) -> bool:
        """Whether it can be used again for these arguments of a new choice."""
        mine = (self._forbidden, self._ends, self._pad)
        same = all(
            a is b or (a is not None and b is not None and a.shape == b.shape)
            for a, b in zip(mine, tensors, strict=True)
        )
        return same and step is self._step and self.rows.shape[1] >= columns

    def begin(self, prompt: Tensor, least: int, *tensors: Tensor | None) -> None:
        """Begin behind a prompt ``(batch, tokens)``, with the tensors that the arguments of ``serves`` are."""
        for mine, given in zip((self._forbidden, self._ends, self._pad), tensors, strict=True):
            if mine is not None and given is not None and mine is not given:
                mine.copy_(given)
        self.rows[:, : prompt.shape[1]].copy_(prompt)
        self._column.fill_(prompt.shape[1])
        self._least.fill_(least)
        self._open.fill_(True)
        self.all_ended.fill_(False)

    def run(self, recorder: Recorder) -> None:
        """Choose one token a row, write it behind the rows and to the step."""
        if self._tape is None:
            state = (self._column, self._open, self.all_ended)
            before = [t.clone() for t in state]
            recorder.warm_up(self._work)
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            self._tape = recorder.record(self._work)
        self._tape.replay()

    def _work(self) -> None:
        logits = self._step.logits
        if logits is None:
            raise RuntimeError("a token is chosen before there are logits")
        if self._forbidden is not None:
            low = torch.full_like(logits[:, :1], float("-inf"))
            held = logits.index_select(1, self._forbidden)
            logits.index_copy_(1, self._forbidden, torch.where(self._column < self._least, low, held))
        tokens = logits.argmax(dim=-1)
        if self._ends is not None and self._pad is not None:
            tokens = torch.where(self._open, tokens, self._pad)
            self._open.logical_and_((tokens[:, None] != self._ends).all(dim=1))
            self.all_ended.copy_(~self._open.any())
        self.rows.index_copy_(1, self._column, tokens[:, None])
        self._step.ids.copy_(tokens[:, None])
        self._column += 1
