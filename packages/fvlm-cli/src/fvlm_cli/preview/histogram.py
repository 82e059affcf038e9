"""How many rows have how many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bin:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


def histogram(lengths: Sequence[int], bins: int = 12) -> list[Bin]:
    """Sort lengths into bins of equal width that start at the shortest."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    starts = range(low, high + 1, width)
    return [Bin(start, start + width - 1, sum(start <= n < start + width for n in lengths)) for start in starts]


def quantile(lengths: Sequence[int], share: float) -> int:
    """Return the length that at least this share of the rows does not exceed."""
    ordered = sorted(lengths)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
