"""Pages of text, drawn, with their words as the answer: what document models are trained on."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.training.workloads import text
from PIL import Image, ImageDraw, ImageFont

_QUESTION = "Read the page."


def page(width: int, height: int, seed: int) -> tuple[Image.Image, str]:
    """Draw a page; return it with its words.

    Args:
        width, height: in pixels.
        seed: of the words.
    """
    words = random.Random(seed)
    size = max(8, height // 40)
    font = ImageFont.load_default(size=size)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    lines = []
    for top in range(size, height - 2 * size, 2 * size):
        lines.append(text(words, max(1, width // (8 * size))))
        pen.text((size, top), lines[-1], fill="black", font=font)
    return image, "\n".join(lines)


def samples(count: int, width: int, height: int) -> list[dict[str, Any]]:
    """Return conversations about one page each; the same ones at every call."""
    made = []
    for seed in range(count):
        image, words = page(width, height, seed)
        turns = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": _QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": words}]},
        ]
        made.append({"messages": turns})
    return made
