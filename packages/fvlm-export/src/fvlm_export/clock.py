"""How long each kind of work in a merge took, over all threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by kind of work; several threads may be at work at once, so the sum may exceed the wall's."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Add the time spent inside to a kind of work, in seconds."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begun
            with self._lock:
                self._seconds[work] += took

    @property
    def seconds(self) -> dict[str, float]:
        """Kind of work → seconds so far."""
        with self._lock:
            return dict(self._seconds)
