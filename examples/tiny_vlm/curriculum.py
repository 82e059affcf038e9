"""The training samples: index → image and transcription, made when asked for, from short strings to long ones.

A model that starts on long strings first learns which characters are frequent and only much later to look; one that
starts on single characters looks at once, and the length then grows faster than it forgets.
"""

from __future__ import annotations

import random
from typing import Any

from printing import print_text
from torch.utils.data import Dataset
from words import training_text

PROMPTS = ("Read the text.", "Read the text.", "What is written here?", "Transcribe the image.")
"""What training asks; the first is what is measured and what ``fvlm quickstart`` asks."""

LONGEST = 9


def conversation(image: Any, prompt: str, answer: str | None) -> dict[str, Any]:
    """Write a question about an image, and its answer unless None, as a sample of ``FastVisionDataCollator``."""
    blocks = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": blocks}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages}


class PrintedText(Dataset[dict[str, Any]]):
    """A dataset of printed strings that stores none: sample ``i`` is a function of ``i`` and the seed.

    Meant to be read in order: the longest string grows from 1 to `LONGEST` characters over the first ``growth`` of it.

    Args:
        size: how many samples.
        seed: another seed gives other samples.
        growth: the fraction of the samples over which strings grow.
    """

    def __init__(self, size: int, seed: int, growth: float) -> None:
        self.size, self.seed, self.growth = size, seed, growth

    def __len__(self) -> int:
        return self.size

    def longest(self, index: int) -> int:
        """How many characters sample ``index`` may have."""
        progress = min(1.0, index / max(1.0, self.growth * self.size))
        return 1 + int(progress * (LONGEST - 1))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = random.Random(self.seed * 1_000_000_007 + index)
        text = training_text(rng, self.longest(index))
        return conversation(print_text(text, rng), rng.choice(PROMPTS), text)
