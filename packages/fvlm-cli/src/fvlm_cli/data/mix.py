"""Datasets with weights → one, in which each has its share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

Item = TypeVar("Item")
Mixing = Literal["oversample", "undersample"]


def counts(sizes: Sequence[int], weights: Sequence[float], mixing: Mixing, limit: int | None = None) -> list[int]:
    """Return how many rows each dataset gives.

    Args:
        sizes: rows of each, none empty.
        weights: the share of each, relative to the others'.
        mixing: oversample: as many that no row is missing; undersample: as many that no row comes twice.
        limit: at most so many in all.
    """
    shares = [weight / sum(weights) for weight in weights]
    whole = [size / share for size, share in zip(sizes, shares, strict=True)]
    total = max(whole) if mixing == "oversample" else min(whole)
    if limit is not None:
        total = min(total, limit)
    found = [max(1, round(total * share)) for share in shares]
    while limit is not None and sum(found) > limit:  # what rounding added
        most = max(range(len(found)), key=lambda number: found[number] - total * shares[number])
        found[most] -= 1
    return found


def mixed(parts: Sequence[Sequence[Item]], wanted: Sequence[int], seed: int) -> list[Item]:
    """Return so many items of each part, part after part: all of them as often as they fit, then some by seed."""
    chosen: list[Item] = []
    for number, (part, count) in enumerate(zip(parts, wanted, strict=True)):
        chosen.extend(list(part) * (count // len(part)))
        rest = random.Random(f"{seed}-{number}").sample(range(len(part)), count % len(part))
        chosen.extend(part[index] for index in sorted(rest))
    return chosen


def interleaved(
    starts: Sequence[Callable[[], Iterator[Item]]], weights: Sequence[float], mixing: Mixing, seed: str
) -> Iterator[Item]:
    """Yield items of streams, each next one from a stream drawn by weight.

    Args:
        starts: what starts each stream.
        weights: as in `counts`.
        mixing: oversample: a stream that ends starts again until each has ended once; undersample: the first end is
            the end of all.
        seed: of the draws.
    """
    draw = random.Random(seed)
    streams = [start() for start in starts]
    ended: set[int] = set()
    while True:
        (number,) = draw.choices(range(len(streams)), weights)
        try:
            item = next(streams[number])
        except StopIteration:
            ended.add(number)
            if mixing == "undersample" or len(ended) == len(streams):
                return
            streams[number] = starts[number]()
            item = next(streams[number])  # a source without rows is an error of its own
        yield item


def shuffled(items: Iterator[Item], buffer: int, seed: str) -> Iterator[Item]:
    """Yield items in another order: each drawn from the next `buffer` of them that are left."""
    draw = random.Random(seed)
    held: list[Item] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        place = draw.randrange(buffer)
        yield held[place]
        held[place] = item
    draw.shuffle(held)
    yield from held
