"""Recording device work and running it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

Work = Callable[[], None]
"""Work that reads and writes fixed memory only."""


class Tape(Protocol):
    """Runs recorded work again."""

    def replay(self) -> None:
        """Run it."""


class Recorder(Protocol):
    """Makes tapes."""

    def warm_up(self, work: Work) -> None:
        """Run work once as recording will, so that kernels are compiled and workspaces exist."""

    def record(self, work: Work) -> Tape:
        """Record work. Whether it also ran is left open."""

    def forget(self) -> None:
        """Give up the memory of all tapes: it is free when the last of them is gone. None is replayed any more."""


class CudaRecorder:
    """Records CUDA graphs whose intermediate results share one pool of memory.

    Sharing is sound because recordings are replayed one after another on one stream, and what must outlive a replay
    lies outside of the pool.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor: Tape | None = None

    def warm_up(self, work: Work) -> None:
        """Run work once on the stream that records."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)

    def record(self, work: Work) -> Tape:
        """Record work; it does not run.

        ``torch.cuda.graph`` would collect garbage and empty the cache around each of the hundred recordings of a model,
        for seconds in all. Errors are watched for in this thread only, since a data loader may pin memory in another.
        """
        if (
            self._anchor is None
        ):  # PyTorch gives a pool up with the last of its graphs, and may not be asked for it again
            self._anchor = self._captured(lambda: torch.zeros(1, device=self._device))
        return self._captured(work)

    def _captured(self, work: Callable[[], object]) -> Tape:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # that the recording is void says less than why
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def forget(self) -> None:
        """Wait for what is running, and use another pool from now on."""
        torch.cuda.synchronize(self._device)
        self._anchor = None
        self._pool = torch.cuda.graph_pool_handle()


class PlainRecorder:
    """Runs the work itself again: what recordings are tested with where there is no GPU."""

    def warm_up(self, work: Work) -> None:
        """Run it."""
        work()

    def record(self, work: Work) -> Tape:
        """Keep it."""
        return _Again(work)

    def forget(self) -> None:
        """There is nothing to free."""


class _Again:
    def __init__(self, work: Work) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()
