"""The loops over recorded steps: greedy, wholly on the device; and any other, with stock's processors and criteria.

``generate`` prepares everything as it does for its own loop (inputs, lengths, processors, criteria) and hands it over;
what comes back is what its own loop would return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fvlm_core.decoding.greedy import GreedyChoice
from fvlm_core.decoding.watch import Watch
from fvlm_core.fused.cache import FIELD

if TYPE_CHECKING:
    from fvlm_core.decoding.step import DecodingStep
    from fvlm_core.graphs.tape import Recorder

BUCKET = 512
"""Memory for keys and values, and for tokens, is a multiple of so many."""


@dataclass
class Request:
    """One call of ``generate``, as it prepared it.

    Attributes:
        ids: ``(batch, tokens)``, the prompt.
        processors: what changes the scores.
        criteria: what stops it; one of them is the longest length.
        config: the generation config.
        streamer: gets tokens as they come, or None.
    """

    ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.ids.shape[1]

    @property
    def ends(self) -> Tensor | None:
        """The tokens that end a row, or None."""
        found = [c.eos_token_id for c in self.criteria if hasattr(c, "eos_token_id")]
        return found[0].to(self.ids.device) if found else None

    @property
    def pad(self) -> Tensor | None:
        """What ended rows are continued with, or None."""
        token = self.config._pad_token_tensor
        return None if token is None else token.to(self.ids.device)

    @property
    def has_scores(self) -> bool:
        """Whether scores or logits are to be returned."""
        return bool(self.config.return_dict_in_generate and (self.config.output_scores or self.config.output_logits))


def rounded_up(tokens: int) -> int:
    """Return the multiple of `BUCKET` that holds so many tokens."""
    return -(-tokens // BUCKET) * BUCKET


def _least_lengths(request: Request) -> tuple[int, Tensor] | None:
    """Return before which length which tokens may not come, of processors that say only this."""
    least, tokens = 0, None
    for processor in request.processors:
        if type(processor) is MinNewTokensLengthLogitsProcessor:
            length = processor.prompt_length_to_skip + processor.min_new_tokens
        elif type(processor) is MinLengthLogitsProcessor:
            length = processor.min_length
        else:
            return None
        least, tokens = max(least, length), processor.eos_token_id
    return (0, torch.zeros(0)) if tokens is None else (least, tokens)


def is_greedy(request: Request) -> bool:
    """Whether the likeliest token is chosen, nothing but lengths and ends counting."""
    known = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in request.criteria)
    return not request.config.do_sample and known and not request.has_scores and _least_lengths(request) is not None


def run_greedy(
    request: Request, step: DecodingStep, choice: GreedyChoice | None, recorder: Recorder, longest: int
) -> tuple[Tensor, GreedyChoice]:
    """Return the rows ``(batch, tokens)`` and what chose them, for the next call.

    Args:
        request: the call.
        step: loaded with the prompt.
        choice: of an earlier call, or None.
        recorder: makes recordings.
        longest: how many tokens a row may have.
    """
    least, forbidden = _least_lengths(request) or (0, torch.zeros(0))
    masked = forbidden.to(request.ids.device) if forbidden.numel() else None
    ends = request.ends
    pad = request.pad if ends is not None else None
    if choice is None or not choice.serves(step, longest, masked, ends, pad):
        choice = GreedyChoice(step, rounded_up(longest), _own(masked), _own(ends), _own(pad))
    choice.begin(request.ids, least, masked, ends, pad)
    watch = Watch(request.ids.shape[0], request.ids.device, request.streamer, ends is not None)
    for number in range(longest - request.prompt):
        if number:
            _make_room(step, request.prompt + number, longest)
            step.run()
        choice.run(recorder)
        if watch.step(choice.all_ended, step.ids[:, 0]):
            break
    length = request.prompt + watch.finish()
    return choice.rows[:, :length].clone(), choice


def _own(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _make_room(step: DecodingStep, tokens: int, longest: int) -> None:
    """Let the cache hold one more token than before; it doubles where it is full."""
    if tokens > step.cache.capacity:
        step.make_room(rounded_up(min(2 * step.cache.capacity, longest)))


@dataclass
class Collected:
    """What a call may ask to get beside the rows."""

    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None


def run_with_processors(request: Request, step: DecodingStep, longest: int) -> tuple[Tensor, Collected]:
    """Return the rows ``(batch, tokens)``, chosen through the call's own processors and criteria, and their scores."""
    config, batch, device = request.config, request.ids.shape[0], request.ids.device
    keeps = config.return_dict_in_generate
    collected = Collected(
        () if keeps and config.output_scores else None, () if keeps and config.output_logits else None
    )
    rows = torch.zeros((batch, longest), dtype=request.ids.dtype, device=device)
    rows[:, : request.prompt] = request.ids
    unfinished = torch.ones(batch, dtype=torch.long, device=device)
    length, pad = request.prompt, request.pad if request.ends is not None else None
    while True:
        if length > request.prompt:
            _make_room(step, length, longest)
            step.run()
        logits = step.logits
        if logits is None:
            raise RuntimeError("a token is chosen before there are logits")
        raw = logits.clone()
        scores = request.processors(rows[:, :length], raw)
        if collected.scores is not None:
            collected.scores += (scores,)
        if collected.logits is not None:
            collected.logits += (raw,)
        tokens = _chosen(scores, config.do_sample)
        if pad is not None:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        rows[:, length] = tokens
        step.ids.copy_(tokens[:, None])
        length += 1
        unfinished = unfinished & ~request.criteria(rows[:, :length], collected.scores)
        if request.streamer is not None:
            request.streamer.put(tokens.cpu())
        if bool(unfinished.max() == 0):
            return rows[:, :length].clone(), collected


def _chosen(scores: Tensor, sample: bool) -> Tensor:
    if not sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)


def answer(request: Request, rows: Tensor, collected: Collected, step: DecodingStep, text_config: Any) -> Any:
    """Return what ``generate`` returns for these rows."""
    if request.streamer is not None:
        request.streamer.end()
    if not request.config.return_dict_in_generate:
        return rows
    held: dict[str, Any] = {FIELD: step.cache.as_dynamic(text_config, rows.shape[1] - 1)}
    return GenerateDecoderOnlyOutput(
        sequences=rows,  # type: ignore[arg-type]
        scores=collected.scores,  # type: ignore[arg-type]
        logits=collected.logits,  # type: ignore[arg-type]
        **held,
    )
