"""Time the providers of a case against each other on one device, interleaved, so that clocks disturb all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, Provider
from benchmarks.kernels.clock import RECORD_BELOW, Call, Clock, rotations
from triton.errors import TritonError

from fvlm_kernels.testing import check_against_reference

REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, TritonError)
"""What a peer raises that cannot run a case."""
SECONDS = 0.1
"""What the timed calls of one provider and pass may take; fewer are made where a call is slow."""


@dataclass(frozen=True)
class Timing:
    """What one provider took for one pass, in seconds; see :mod:`.clock` for what each means.

    Attributes:
        p20, p50, p80: percentiles behind a busy GPU.
        host: for which the host is busy with one call.
        eager: of one call among many, launched from Python.
        device: of one call in a recorded graph; ``None`` where it is not recorded.
        peak: bytes held at most beyond those held before.
    """

    p20: float
    p50: float
    p80: float
    host: float
    eager: float
    device: float | None
    peak: int


def check(case: Case, device: torch.device) -> None:
    """Hold our provider to the error policy at the very shape to be measured.

    Raises:
        AssertionError: it breaks the policy; nothing may be timed.
    """
    ours, reference = case.checked or case.providers["fvlm"], case.reference
    if case.in_place:
        ours, reference = partial(_on_copies, ours), partial(_on_copies, reference)
    check_against_reference(ours, reference, case.make(device), case.wanted)


def _on_copies(provider: Provider, **inputs: torch.Tensor) -> Any:
    return provider(**{name: tensor.clone() for name, tensor in inputs.items()})


def _without_gradient(provider: Provider, inputs: Inputs) -> Any:
    with torch.no_grad():
        return provider(**inputs)


def _outputs(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _differentiate(
    provider: Provider, given: Inputs, wanted: Sequence[str], grads: Sequence[torch.Tensor] | None
) -> Any:
    """Run both passes; a loss needs no gradient of its own."""
    return torch.autograd.grad(_outputs(provider(**given)), [given[n] for n in wanted], grads)


def calls_of(case: Case, name: str, mode: str, copies: list[Inputs]) -> list[Call]:
    """Return one call a set of inputs of one provider's pass; a backward pass is given its forward pass here."""
    provider = case.providers[name]
    if mode == "forward":
        return [partial(_without_gradient, provider, inputs) for inputs in copies]
    calls: list[Call] = []
    for inputs in copies:
        given = {n: t.detach().requires_grad_(n in case.wanted) for n, t in inputs.items()}
        if name == "liger":  # it writes to its inputs, which no leaf allows
            given = {n: t * 1 if t.requires_grad else t for n, t in given.items()}
        outputs = _outputs(provider(**given))
        grads = None if outputs[0].dim() == 0 else [torch.randn_like(o) for o in outputs]
        if mode == "both":
            calls.append(partial(_differentiate, provider, given, case.wanted, grads))
            continue
        sources = [given[n] for n in case.wanted]
        calls.append(partial(torch.autograd.grad, outputs, sources, grads, retain_graph=True))
    return calls


def _time(clock: Clock, calls: list[Call], reads: list[Callable[[], float]], recorded: bool) -> Timing:
    deciles = quantiles([read() for read in reads], n=10, method="inclusive")
    typical = deciles[4]
    host, eager = clock.eager(calls[0], max(2, min(20, int(SECONDS / 3 / max(typical, 1e-6)))))
    device = clock.replayed(calls) if recorded and typical < RECORD_BELOW else None
    return Timing(deciles[1], typical, deciles[7], host, eager, device, clock.peak(calls[0]))


def measure(case: Case, clock: Clock, mode: str, repeats: int) -> dict[str, Timing | str]:
    """Time one pass of every provider of a case.

    Args:
        case: what to run.
        clock: of the device to run on.
        mode: one of the case's passes: ``"forward"``, ``"backward"`` or ``"both"``.
        repeats: timed calls of each provider, at most.

    Returns:
        the timings by provider; for a peer that cannot run the case, why not.
    """
    first = case.make(clock.device)
    count = rotations(sum(t.nbytes for t in first.values())) if clock.is_gpu else 2
    copies = [first, *(case.make(clock.device) for _ in range(count - 1))]
    results: dict[str, Timing | str] = {}
    turns: dict[str, list[Call]] = {}
    for name in case.providers:
        try:
            turns[name] = calls_of(case, name, mode, copies)
            turns[name][0]()
        except REFUSALS as reason:
            if name == "fvlm":
                raise
            results[name], _ = f"{type(reason).__name__}: {reason}".splitlines()[0], turns.pop(name, None)
    slowest = max(clock.once(turn[0]) for turn in turns.values())
    rounds = max(6, min(repeats, int(SECONDS / slowest))) if clock.is_gpu else repeats
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in turns}
    for i in range(rounds):
        for name, turn in turns.items():
            pending[name].append(clock.start(turn[i % len(turn)]))
    clock.sync()
    return results | {name: _time(clock, turn, pending[name], case.recorded) for name, turn in turns.items()}
