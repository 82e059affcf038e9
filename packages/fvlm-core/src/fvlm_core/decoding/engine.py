"""Binding recorded decoding to a model's ``generate``, and taking it off again."""

from __future__ import annotations

import inspect
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fvlm_core.arch import facts_for, task_model
from fvlm_core.bound import bind
from fvlm_core.decoding.cache import FixedCache
from fvlm_core.decoding.fitness import MOST_ROWS, call_unfit, crossing_layers, model_unfit
from fvlm_core.decoding.greedy import GreedyChoice
from fvlm_core.decoding.loop import Collected, Request, answer, is_greedy, rounded_up, run_greedy, run_with_processors
from fvlm_core.decoding.state import ModelState
from fvlm_core.decoding.step import DecodingStep, StepError
from fvlm_core.fused.cache import FIELD
from fvlm_core.graphs.tape import CudaRecorder, PlainRecorder, Recorder

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_DECODER = "_fvlm_decoder"
_MOST_SLOTS = 4
"""How many batch sizes (and dtypes, and modes) are kept recorded; the one that was not used for longest goes first."""
_FIRST_ROOM = 2048
"""Tokens behind the prompt that the first memory is for; a longer answer gets more when it comes so far."""


@dataclass
class DecodingReport:
    """How calls of ``generate`` were served since decoding was enabled.

    Attributes:
        recorded: by replays of a recorded step.
        left: by transformers → why.
        recordings: how often a step was recorded.
    """

    recorded: int = 0
    left: Counter[str] = field(default_factory=Counter)
    recordings: int = 0

    @property
    def summary(self) -> str:
        """One line."""
        reasons = "; ".join(f"{count} left to transformers since {reason}" for reason, count in self.left.items())
        return f"{self.recorded} calls decoded by recordings ({self.recordings} made)" + (
            f"; {reasons}" if reasons else ""
        )


@dataclass
class _Slot:
    """What belongs to one batch size, dtype and mode of inference."""

    cache: FixedCache
    step: DecodingStep
    choice: GreedyChoice | None = None


class Decoder:
    """Serves ``generate`` of one model.

    Args:
        model: the task model.
        rehearse: use recordings that run the step's own code again, on any device; for tests.
    """

    def __init__(self, model: Any, rehearse: bool) -> None:
        self._model, self._rehearse = model, rehearse
        self._state: ModelState | None = None
        self._slots: OrderedDict[tuple[Any, ...], _Slot] = OrderedDict()
        self._recorders: dict[torch.device, Recorder] = {}
        self.report = DecodingReport()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or stored model records anew."""
        return Decoder, (self._model, self._rehearse)

    @cached_property
    def _language(self) -> Any:
        """The language model, without its head."""
        return self._model.get_submodule(facts_for(self._model).language[0])

    def unfit(self, arguments: Mapping[str, Any]) -> str | None:
        """Say why a call with these arguments is left to transformers, or None."""
        reason = (
            _device_unfit(self._model, self._rehearse)
            or call_unfit(self._model, arguments)
            or model_unfit(self._language)
        )
        if reason is not None:
            return reason
        if self._state is None or not self._state.holds():
            self._state = ModelState(self._model, self._language)
            self._slots.clear()  # recordings of another state are no longer right
        return self._state.unfit()

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode in the place of stock's loop, whose signature this is."""
        request = Request(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        mask = model_kwargs.get("attention_mask")
        reason = _request_unfit(request, mask, model_kwargs)
        if reason is None:
            try:
                return self._recorded(request, dict(model_kwargs))
            except StepError as error:
                reason = str(error)
        self.leave(reason)
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def leave(self, reason: str) -> None:
        """Count a call that is left to transformers, and say why when it is the first of its kind."""
        if reason not in self.report.left:
            logger.info("generate runs as transformers has it: %s.", reason)
        self.report.left[reason] += 1

    def _recorded(self, request: Request, model_kwargs: dict[str, Any]) -> Any:
        longest = request.criteria.max_length
        slot = self._slot(request, model_kwargs, longest)
        recorder = self._recorder_for(request.ids.device)
        model_kwargs[FIELD] = slot.cache
        prompt: dict[str, Any] = {}
        handle = self._language.register_forward_pre_hook(
            lambda _module, _args, kwargs: prompt.update(kwargs), with_kwargs=True
        )
        try:
            outputs = self._model._prefill(request.ids, request.config, model_kwargs)
        finally:
            handle.remove()
        slot.step.load(prompt, outputs.logits[:, -1], request.prompt)
        prompt.clear()
        del outputs
        made = slot.step.recordings
        collected = Collected(None, None)
        if is_greedy(request):
            rows, slot.choice = run_greedy(request, slot.step, slot.choice, recorder, longest)
        else:
            rows, collected = run_with_processors(request, slot.step, longest)
        self.report.recorded += 1
        self.report.recordings += slot.step.recordings - made
        return answer(request, rows, collected, slot.step, self._language.config)

    def _slot(self, request: Request, model_kwargs: dict[str, Any], longest: int) -> _Slot:
        """Return the memory for a request, made ready for its prompt."""
        device = request.ids.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        # Outside of inference mode torch refuses to write to a tensor that was made in it.
        key = (request.ids.shape[0], device, autocast, torch.is_inference_mode_enabled())
        capacity = rounded_up(min(longest, request.prompt + _FIRST_ROOM))
        slot = self._slots.pop(key, None)
        if slot is None:
            while len(self._slots) >= _MOST_SLOTS:
                self._slots.popitem(last=False)
            cache = FixedCache(crossing_layers(self._language.layers), request.ids.shape[0], capacity, device)
            head = self._model.get_output_embeddings()
            slot = _Slot(cache, DecodingStep(self._language, head, cache, self._recorder_for(device), autocast))
        self._slots[key] = slot
        slot.cache.begin(model_kwargs.get("attention_mask"), request.prompt, capacity)
        return slot

    def _recorder_for(self, device: torch.device) -> Recorder:
        if device not in self._recorders:
            self._recorders[device] = PlainRecorder() if self._rehearse else CudaRecorder(device)
        return self._recorders[device]


def _device_unfit(model: Any, rehearse: bool) -> str | None:
    return None if rehearse or model.device.type == "cuda" else "the model is not on a CUDA device"


def _request_unfit(request: Request, mask: Any, model_kwargs: Mapping[str, Any]) -> str | None:
    if request.ids.shape[0] > MOST_ROWS:
        return f"a batch of {request.ids.shape[0]} rows is larger than {MOST_ROWS}"
    if request.criteria.max_length is None:
        return "no longest length was given"
    if model_kwargs.get("position_ids") is None:
        return "there are no positions"
    if not request.prompt or (mask is not None and tuple(mask.shape) != tuple(request.ids.shape)):
        return "the mask is not that of the prompt"
    return None


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate as the model's class does, its loop replaced by recorded steps where that is possible.

    Bound to an instance, under its name.
    """
    stock = type(model).generate
    decoder: Decoder = vars(model)[_DECODER]
    arguments = _by_name(stock, model, args, kwargs)
    reason = decoder.unfit(arguments)
    if reason is not None:
        decoder.leave(reason)
        return stock(model, *args, **kwargs)
    loop = partial(decoder.decode, streamer=arguments.get("streamer"))
    return stock(model, **_with_stop_strings(arguments), custom_generate=loop)


def _by_name(stock: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(stock).parameters)[1 : 1 + len(args)]
    return {**dict(zip(names, args, strict=True)), **kwargs}


def _with_stop_strings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Make the criterion of stop strings, which ``generate`` does not hand its tokenizer to where it has a loop."""
    if arguments.get("stop_strings") is None or arguments.get("tokenizer") is None:
        return arguments
    from transformers import StoppingCriteriaList, StopStringCriteria

    made = StopStringCriteria(tokenizer=arguments["tokenizer"], stop_strings=arguments["stop_strings"])
    criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), made])
    rest = {name: value for name, value in arguments.items() if name not in ("stop_strings", "tokenizer")}
    return {**rest, "stopping_criteria": criteria}


def decoding_unfit(model: nn.Module) -> str | None:
    """Say why nothing that a model is asked can be decoded by recordings, on any machine, or None.

    Args:
        model: a task model, or PEFT's wrapper around one, with its fused layers; weights are not looked at.
    """
    facts, inner = facts_for(model), task_model(model)
    if facts.generic:
        return "the family has no table of fused layers"
    return model_unfit(inner.get_submodule(facts.language[0]))


def enable_decoding(model: nn.Module, rehearse: bool = False) -> str | None:
    """Let a model's ``generate`` decode by recorded steps from now on.

    Args:
        model: a task model, or PEFT's wrapper around one.
        rehearse: use recordings that run the step's own code again, on any device; for tests.

    Returns:
        Why it never will for this model, in which case nothing is changed; else None.
    """
    inner: Any = task_model(model)
    reason = _device_unfit(inner, rehearse)
    if reason is not None:
        return reason
    if vars(inner).get(_DECODER) is not None:
        return None
    reason = decoding_unfit(inner)
    if reason is not None:
        logger.info("Decoding stays as transformers has it: %s.", reason)
        return reason
    vars(inner)[_DECODER] = Decoder(inner, rehearse)
    bind(inner, generate)
    return None


def disable_decoding(model: nn.Module) -> None:
    """Give a model its class's ``generate`` back, and let go of recordings and their memory."""
    inner = task_model(model)
    if vars(inner).pop(_DECODER, None) is not None:
        del vars(inner)["generate"]


def decoding_report(model: nn.Module) -> DecodingReport:
    """Return how calls of ``generate`` were served; an empty report where decoding is not enabled."""
    decoder = vars(task_model(model)).get(_DECODER)
    return decoder.report if isinstance(decoder, Decoder) else DecodingReport()
