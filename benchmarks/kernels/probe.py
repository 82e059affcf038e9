"""What the profiles of :mod:`.why` share: a line of theirs, and how calls are timed for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.kernels.case import Case, Inputs
from benchmarks.kernels.clock import Call, Clock, rotations
from benchmarks.kernels.measure import calls_of
from benchmarks.kernels.ops import OPS


@dataclass(frozen=True)
class Part:
    """One line: of which op and case, what was timed, how long it took, and what it moved or computed at least."""

    op: str
    case: str
    what: str
    us: float
    nbytes: int = 0
    flops: int = 0


class Probe:
    """Times calls over rotating inputs, and hands out the cases of the benchmark."""

    def __init__(self, clock: Clock, tiny: bool) -> None:
        self.clock, self.tiny, self.device = clock, tiny, clock.device

    def us(self, calls: Sequence[Call]) -> float:
        """Return the microseconds of a call on the device, recorded where that is possible."""
        for call in calls[:2]:
            call()
        seconds = self.clock.replayed(calls)
        if seconds is None:
            seconds = self.clock.eager(calls[0], 3)[1]
        return round(seconds * 1e6, 2)

    def host(self, call: Call, times: int = 200) -> float:
        """Return the microseconds for which the host is busy with one call among many."""
        call()
        self.clock.sync()
        times = 3 if self.tiny else times
        begin = time.perf_counter()
        for _ in range(times):
            call()
        busy = time.perf_counter() - begin
        self.clock.sync()
        return round(busy / times * 1e6, 2)

    def cases(self, op: str, *beginnings: str) -> Iterator[Case]:
        """Yield the cases of an op whose names begin so; with ``--tiny`` the first."""
        made = OPS[op](self.tiny)
        yield from made[:1] if self.tiny else (c for c in made if c.name.startswith(beginnings))

    def inputs(self, case: Case) -> list[Inputs]:
        """Return as many sets of inputs as no cache holds."""
        first = case.make(self.device)
        count = rotations(sum(t.nbytes for t in first.values())) if self.clock.is_gpu else 1
        return [first, *(case.make(self.device) for _ in range(count - 1))]

    def provider(self, case: Case, name: str, mode: str, sets: list[Inputs]) -> float:
        """Return the microseconds of one provider's pass."""
        return self.us(calls_of(case, name, mode, sets))
