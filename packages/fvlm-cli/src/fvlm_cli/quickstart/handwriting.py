"""Strings of real handwritten digits: scikit-learn's 8 × 8 scans, three to five of them written side by side.

The scans ship with scikit-learn (Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998), so
nothing is downloaded. Train and test strings are made from different scans: the model never sees a test digit before
the test.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH, HEIGHT = 128, 32
"""The size of an image in pixels: what the tiny VLM was pretrained on."""

TRAIN_SCANS = 1397
"""How many of the 1797 scans training strings are made from; test strings are made from the other 400."""

_DIGIT = 24  # pixels a side: each of a scan's pixels becomes 3 × 3
_SPLIT_SEED = 20  # which scans are test scans is the same for every --seed, so that runs compare


@dataclass(frozen=True)
class Writing:
    """One image and what is written on it.

    Attributes:
        image: grey (mode ``L``), `WIDTH` × `HEIGHT`, dark ink on white.
        text: the digits, left to right.
        scans: which of the 1797 scans it was made from.
    """

    image: Image.Image
    text: str
    scans: tuple[int, ...]


@lru_cache(maxsize=1)
def _scans() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the scans, (1797, 8, 8) float64 from 0 (paper) to 16 (ink), and their digits, (1797,) int."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


def split() -> tuple[list[int], list[int]]:
    """Return the indices of the scans for training and of those for testing, which share none."""
    order = list(range(len(_scans()[1])))
    random.Random(_SPLIT_SEED).shuffle(order)
    return order[:TRAIN_SCANS], order[TRAIN_SCANS:]


def _stamp(scan: NDArray[Any], side: int) -> Image.Image:
    """Enlarge a scan to ``side`` × ``side`` pixels of dark ink on white (mode ``L``)."""
    ink = Image.fromarray((255 - scan * (255 / 16)).astype(np.uint8))
    return ink.resize((side, side), Image.Resampling.BICUBIC)


def _vary(stamp: Image.Image, rng: random.Random) -> Image.Image:
    """Turn, slant, stretch and shift a digit a little, as the same hand might on another day."""
    turn, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25)
    wide, tall = rng.uniform(0.85, 1.15), rng.uniform(0.85, 1.15)
    middle = stamp.width / 2
    # Output → input, about the middle: x' = wide·x + slant·y, y' = turn·x + tall·y.
    shift_x = middle * (1 - wide - slant) + rng.uniform(-1.5, 1.5)
    shift_y = middle * (1 - turn - tall) + rng.uniform(-1.5, 1.5)
    grid = (wide, slant, shift_x, turn, tall, shift_y)
    return stamp.transform(stamp.size, Image.Transform.AFFINE, grid, Image.Resampling.BILINEAR, fillcolor=255)


def write(rng: random.Random, pool: list[int], *, varied: bool) -> Writing:
    """Write a string of three to five digits taken from ``pool``, at a random place with random spacing.

    Args:
        rng: where every choice comes from.
        pool: indices of the scans to take.
        varied: give each digit another turn, slant and proportion than its scan has.
    """
    images, digits = _scans()
    scans = tuple(rng.choice(pool) for _ in range(rng.randint(3, 5)))
    sides = [rng.randint(_DIGIT - 2, _DIGIT) for _ in scans]
    gaps = [rng.randint(-2, 2) for _ in scans[1:]]
    paper = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    x = rng.randint(0, max(0, WIDTH - sum(sides) - sum(gaps)))
    for scan, side, gap in zip(scans, sides, [*gaps, 0], strict=True):
        x = min(x, WIDTH - side)
        y = rng.randint(2, HEIGHT - side - 2)
        place = paper[y : y + side, x : x + side]
        stamp = _stamp(images[scan], side)
        np.minimum(place, np.asarray(_vary(stamp, rng) if varied else stamp), out=place)
        x += side + gap
    return Writing(Image.fromarray(paper), "".join(str(digits[scan]) for scan in scans), scans)


def writings(count: int, seed: int, *, test: bool) -> list[Writing]:
    """Write ``count`` strings from the training scans, varied, or from the test scans, as they are.

    Args:
        count: how many, at least 1.
        seed: another seed gives other strings of the same scans.
        test: which scans.

    Raises:
        ConfigError: ``count`` is below 1.
    """
    if count < 1:
        raise ConfigError(f"count={count} handwritten strings cannot be made: ask for at least 1.")
    pool = split()[test]
    rng = random.Random(f"{seed}-{'test' if test else 'train'}")
    return [write(rng, pool, varied=not test) for _ in range(count)]
