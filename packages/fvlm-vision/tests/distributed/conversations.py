"""The conversations that the processes of `scenarios.py` learn, made from their number."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_WORDS = ("seven", "pages", "of", "blue", "paper", "and", "one", "stamp")


def sample(number: int, *, image: bool = True, words: int | None = None) -> dict[str, Any]:
    """A conversation; answers are of 1 to 23 words, so that ranks learn very different numbers of tokens."""
    rng = np.random.default_rng(number)
    height, width = (int(side) * 28 for side in rng.integers(1, 4, 2))
    blocks: list[dict[str, Any]] = [{"type": "text", "text": "what is it"}]
    if image:
        pixels = rng.integers(0, 255, (height, width, 3), dtype="uint8")
        blocks.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
    count = 1 + (number * 7) % 23 if words is None else words
    answer = " ".join(_WORDS[(number + place) % len(_WORDS)] for place in range(count))
    return {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]}


def mixed(number: int) -> dict[str, Any]:
    """Some batches of one rank hold no image while the other's do: rank 1's first, rank 0's second, both's third."""
    return sample(number, image=number not in (2, 3, 4, 5, 8, 9, 10, 11))
