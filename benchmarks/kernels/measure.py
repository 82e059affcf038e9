"""Time the providers of a case against each other on one device.

Calls are interleaved, so that clocks and neighbours disturb all alike. Inputs are rotated, and before each timed call
on a GPU a large buffer is read: that evicts them from the L2 cache without leaving dirty lines in it, and keeps the GPU
busy while the host queues the call, so that what is timed is the device and not Python. The host's own time a call is
measured apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, Provider

from fvlm_kernels.testing import check_against_reference

FLUSH_BYTES = 2**30
COPIES = 3


@dataclass(frozen=True)
class Timing:
    """What one provider took for one pass: seconds at three percentiles, host seconds a call, peak bytes."""

    p20: float
    p50: float
    p80: float
    host: float
    peak: int


class Clock:
    """Times single calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.filler = torch.ones(FLUSH_BYTES // 4, device=device) if self.is_gpu else None

    def sync(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def start(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Run ``call`` once; the answer returns its seconds after :meth:`sync`."""
        if self.filler is None:
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            return lambda: seconds
        self.filler.sum()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        return lambda: first.elapsed_time(last) / 1e3

    def host(self, call: Callable[[], Any], times: int) -> float:
        """Return the seconds that the host takes to queue one call."""
        self.sync()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        seconds = (time.perf_counter() - begin) / times
        self.sync()
        return seconds

    def peak(self, call: Callable[[], Any]) -> int:
        """Return the most bytes that one call holds beyond what was held before."""
        if not self.is_gpu:
            return 0
        self.sync()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.sync()
        return torch.cuda.max_memory_allocated(self.device) - before


def check(case: Case, device: torch.device) -> None:
    """Hold our provider to the error policy at the very shape to be measured.

    Raises:
        AssertionError: it breaks the policy; nothing may be timed.
    """
    ours, reference = case.providers["fvlm"], case.reference
    if case.in_place:
        ours, reference = partial(_on_copies, ours), partial(_on_copies, reference)
    check_against_reference(ours, reference, case.make(device), case.wanted)


def _on_copies(provider: Provider, **inputs: torch.Tensor) -> Any:
    return provider(**{name: tensor.clone() for name, tensor in inputs.items()})


def _without_gradient(provider: Provider, inputs: Inputs) -> Any:
    with torch.no_grad():
        return provider(**inputs)


def _differentiate(provider: Provider, given: Inputs, wanted: Sequence[str]) -> Any:
    """Run both passes of a loss."""
    return torch.autograd.grad(provider(**given), [given[n] for n in wanted])


def _calls_with_gradient(
    provider: Provider, copies: list[Inputs], wanted: Sequence[str], writes_inputs: bool, together: bool
) -> list[Callable[[], Any]]:
    calls: list[Callable[[], Any]] = []
    for inputs in copies:
        given = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
        if writes_inputs:  # which no leaf allows
            given = {n: t * 1 for n, t in given.items()}
        if together:
            calls.append(partial(_differentiate, provider, given, wanted))
            continue
        result = provider(**given)
        outputs = [result] if isinstance(result, torch.Tensor) else list(result)
        grads = [torch.randn_like(o) for o in outputs]
        sources = [given[n] for n in wanted]
        calls.append(partial(torch.autograd.grad, outputs, sources, grads, retain_graph=True))
    return calls


def measure(case: Case, clock: Clock, mode: str, repeats: int) -> dict[str, Timing]:
    """Time one pass of every provider of a case.

    Args:
        case: what to run.
        clock: of the device to run on.
        mode: one of the case's passes: ``"forward"``, ``"backward"`` or ``"both"``.
        repeats: timed calls of each provider.

    Returns:
        the timings by provider.
    """
    copies = [case.make(clock.device) for _ in range(COPIES)]
    calls = {
        name: [partial(_without_gradient, provider, inputs) for inputs in copies]
        if mode == "forward"
        else _calls_with_gradient(provider, copies, case.wanted, name == "liger", mode == "both")
        for name, provider in case.providers.items()
    }
    for turn in calls.values():
        for call in turn:
            call()
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for i in range(repeats):
        for name, turn in calls.items():
            pending[name].append(clock.start(turn[i % COPIES]))
    clock.sync()
    timings = {}
    for name, turn in calls.items():
        deciles = quantiles([read() for read in pending[name]], n=10, method="inclusive")
        timings[name] = Timing(
            deciles[1], deciles[4], deciles[7], clock.host(turn[0], min(repeats, 20)), clock.peak(turn[0])
        )
    return timings
