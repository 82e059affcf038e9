"""Half-open spans of characters, and the tokens that they cover."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Span = tuple[int, int]
"""Start (included) and end (excluded), in characters."""


def intersect(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """Return where two ordered, disjoint lists of spans overlap."""
    result = []
    for start, end in left:
        for other_start, other_end in right:
            low, high = max(start, other_start), min(end, other_end)
            if low < high:
                result.append((low, high))
    return result


def complement(spans: Sequence[Span], length: int) -> list[Span]:
    """Return what ordered, disjoint spans leave of `0…length`."""
    result, at = [], 0
    for start, end in spans:
        if start > at:
            result.append((at, start))
        at = max(at, end)
    if at < length:
        result.append((at, length))
    return result


def move(spans: Sequence[Span], replacements: Sequence[tuple[Span, Span]]) -> list[Span]:
    """Return spans of a text after pieces of it were replaced.

    Args:
        spans: in the text before.
        replacements: (span before, span after) of each replaced piece, ordered; spans that hold such a piece grow
            with it.
    """

    def moved(place: int) -> int:
        shift = 0
        for (_, old_end), (_, new_end) in replacements:
            if old_end <= place:
                shift = new_end - old_end
        return place + shift

    return [(moved(start), moved(end)) for start, end in spans]


def insertion(before: str, after: str) -> tuple[Span, Span] | None:
    """Return where `after` has a piece inserted into `before`, as `move` takes it; None when that is not what it is.

    Text may also have been added at the end.
    """
    at = 0
    while at < min(len(before), len(after)) and before[at] == after[at]:
        at += 1
    for length in range(len(after) - len(before) + 1):
        if after.startswith(before[at:], at + length):
            return (at, at), (at, at + length)
    return None


def tokens_in(spans: Sequence[Span], offsets: torch.Tensor) -> torch.Tensor:
    """Return which tokens have a character in one of the spans.

    Args:
        spans: in characters of the text that was tokenized.
        offsets: the tokens' (start, end) characters, shape (tokens, 2), int64; an empty token (a trimmed space)
            counts by its place.

    Returns:
        Shape (tokens,), bool.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    ends = torch.maximum(ends, starts + 1)
    inside = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return inside
