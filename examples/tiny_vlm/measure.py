"""What a checkpoint reads: exact match, by generation, on strings that training never drew."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image
from printing import print_text
from words import measured_text

from fvlm_cli.quickstart.handwriting import writings
from fvlm_cli.quickstart.reading import exact_match, transcribe
from fvlm_vision import FastVisionModel

_SEED = 987_654_321  # of the measurement; training seeds samples by its own seed and their index


def printed(kind: str, count: int, *, clean: bool) -> tuple[list[Image.Image], list[str]]:
    """Print ``count`` held-out strings of a kind (see `words.measured_text`), damaged as in training or clean."""
    rng = random.Random(f"{_SEED}-{kind}-{clean}")
    texts = [measured_text(rng, kind) for _ in range(count)]
    return [print_text(text, rng, clean=clean) for text in texts], texts


def measure(checkpoint: Path, count: int) -> dict[str, float]:
    """Load a checkpoint in 16 bit, and once more in 4 bit, and return the exact match on each kind of string.

    ``digits``, ``letters`` and ``words`` are printed as in training (worn, tilted, blurred, noisy, inverted), and
    ``…_clean`` without that; ``handwritten`` are test strings of ``fvlm quickstart``, a hand the checkpoint never saw.
    """
    found: dict[str, float] = {}
    sets = {kind: printed(kind, count, clean=False) for kind in ("digits", "letters", "words")}
    sets |= {f"{kind}_clean": printed(kind, count, clean=True) for kind in ("digits", "letters", "words")}
    hand = writings(count, 0, test=True)
    sets["handwritten"] = [writing.image for writing in hand], [writing.text for writing in hand]
    for four_bit in (False, True):
        model, processor = FastVisionModel.from_pretrained(
            str(checkpoint), load_in_4bit=four_bit, load_in_16bit=not four_bit, use_gradient_checkpointing=False
        )
        FastVisionModel.for_inference(model)
        for name, (images, texts) in sets.items():
            if not four_bit or name in ("digits", "handwritten"):
                answers = transcribe(model, processor, images, batch_size=250)
                found[f"{name}_4bit" if four_bit else name] = round(exact_match(answers, texts), 4)
    return found
