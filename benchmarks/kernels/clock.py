"""Three ways to time a call on a GPU, because each answers another question.

* *behind a busy GPU*: a large buffer is read first, which evicts the inputs from the L2 cache without leaving dirty
  lines in it and keeps the GPU busy while the host queues the call; then the call between two events. It is the
  device's time for calls whose host time hides behind that reading (about 0.25 ms), plus about 2 µs of the events.
* *on the device*: calls over different inputs, recorded one after another into one CUDA graph and replayed. No host
  time and no events between them: what a call costs in a recorded step.
* *in eager mode*: calls queued one after another, until the device has done them all. Where the host is the slower of
  the two it is the host's time: what a call costs in a step that is launched from Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
FLUSH_BYTES = 2**30
RECORD_BELOW = 6e-3  # a call that is short on the device takes up to 5 ms where the host is slow
"""Seconds from which on a call is not recorded: launches and events weigh nothing there."""


class Clock:
    """Times calls on a device. On a GPU everything runs on a stream of its own, on which graphs can be captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.filler = torch.ones(FLUSH_BYTES // 4, device=device) if self.is_gpu else None
        self.stream = torch.cuda.Stream(device) if self.is_gpu else None
        self._copies: dict[int, float] = {}

    def on_stream(self) -> AbstractContextManager[Any]:
        """Return the context to make and time recorded calls in: backward passes run where their forward passes ran."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def sync(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def start(self, call: Call) -> Callable[[], float]:
        """Run ``call`` once behind a busy GPU; the answer returns its seconds after :meth:`sync`."""
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

    def once(self, call: Call) -> float:
        """Return the seconds of one call from an idle device until it is done."""
        self.sync()
        begin = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - begin

    def eager(self, call: Call, times: int) -> tuple[float, float]:
        """Return seconds a call of ``times`` calls in a row: until the host has queued them, and until all is done."""
        self.sync()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        queued = time.perf_counter() - begin
        self.sync()
        return queued / times, (time.perf_counter() - begin) / times

    def waits(self, call: Call) -> bool:
        """Tell whether the call waits for the device, as ``.item()`` does; such a call cannot be recorded."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def replayed(self, calls: Sequence[Call], repeats: int = 7) -> float | None:
        """Return the device's seconds a call, recorded; ``None`` without a GPU or where the calls cannot be recorded.

        What the calls return stays alive, so that each writes to memory of its own.
        """
        if not self.is_gpu or self.waits(calls[0]):
            return None
        self.sync()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin()
            try:
                kept = [call() for call in calls]
            finally:
                graph.capture_end()
        except RuntimeError as reason:
            print(f"not recorded: {str(reason).splitlines()[0]}", flush=True)
            return None
        graph.replay()
        reads = [self.start(graph.replay) for _ in range(repeats)]
        self.sync()
        del kept
        return median(read() for read in reads) / len(calls)

    def peak(self, call: Call) -> int:
        """Return the most bytes that one call holds beyond what was held before."""
        if not self.is_gpu:
            return 0
        self.sync()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.sync()
        return torch.cuda.max_memory_allocated(self.device) - before

    def copying(self, moved: int) -> float:
        """Return the bytes a second of PyTorch's own copy that moves as many bytes, timed as the ops are."""
        if moved not in self._copies:
            half = max(moved // 2, 1)
            pairs = [
                [torch.empty(half, dtype=torch.uint8, device=self.device) for _ in range(2)]
                for _ in range(rotations(half))
            ]
            calls = [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]
            for call in calls:
                call()
            with self.on_stream():
                seconds = self.replayed(calls) if self.once(calls[0]) < RECORD_BELOW else None
            if seconds is None:
                reads = [self.start(calls[i % len(calls)]) for i in range(7)]
                self.sync()
                seconds = median(read() for read in reads)
            self._copies[moved] = 2 * half / seconds
        return self._copies[moved]


def rotations(nbytes: int) -> int:
    """Return over how many sets of inputs of ``nbytes`` to rotate: several times the L2 cache, but at most 32."""
    return max(3, min(32, 2**28 // max(nbytes, 1)))
