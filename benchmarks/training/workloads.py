"""What is trained on: the same pixels and words for every stack."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("invoice", "total", "amount", "date", "payment", "number", "customer", "street", "item", "price", "tax")


@dataclass(frozen=True)
class Workload:
    """Images of one size and about so many words; how many samples make a batch, and batches a step."""

    width: int
    height: int
    question: int
    answer: int
    batch: int
    accumulation: int


WORKLOADS = {
    "ocr": Workload(512, 512, 8, 96, 2, 4),
    "doc": Workload(1120, 896, 16, 384, 4, 1),
    "toy": Workload(56, 56, 3, 8, 2, 2),
}


def text(source: random.Random, words: int) -> str:
    """Return so many words, some with numbers behind them."""
    return " ".join(
        source.choice(WORDS) + (str(source.randint(0, 9999)) if source.random() < 0.3 else "") for _ in range(words)
    )


def samples(workload: Workload, count: int) -> list[dict[str, Any]]:
    """Return conversations with one image of noise each; the same ones at every call."""
    words, pixels = random.Random(1), np.random.default_rng(0)
    made = []
    for _ in range(count):
        image = Image.fromarray(pixels.integers(0, 255, (workload.height, workload.width, 3), dtype=np.uint8))
        question = [{"type": "image", "image": image}, {"type": "text", "text": text(words, workload.question)}]
        answer = [{"type": "text", "text": text(words, workload.answer)}]
        made.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return made
