"""Which strings are printed on the training images, and which are kept for the measurement.

A string of three characters or more is held out by its own checksum, so training and measurement cannot overlap
whatever their seeds are: `held_out` is true for one string in sixteen, and training never draws those.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

DIGITS = "0123456789"
ALPHANUMERIC = DIGITS + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

WORDS = tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def held_out(text: str) -> bool:
    """Tell whether a string is kept for the measurement; case does not matter, short strings are never kept."""
    return len(text) >= 3 and zlib.crc32(text.lower().encode()) % 16 == 0


TRAIN_WORDS = tuple(word for word in WORDS if not held_out(word))
HELD_OUT_WORDS = tuple(word for word in WORDS if held_out(word))


def _draw(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def _amount(rng: random.Random, length: int) -> str:
    """A price, a date or a code, cut to ``length`` characters."""
    number = rng.randrange(10 ** rng.randint(1, 4))
    forms = (
        f"{number / 100:.2f}",
        f"${number}",
        f"{number}%",
        f"{rng.randint(1, 28):02}/{rng.randint(1, 12):02}",
        f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
        f"{_draw(rng, ALPHANUMERIC[36:], 2)}-{number}",
        f"#{number}",
    )
    return rng.choice(forms)[:length]


def _word(rng: random.Random, length: int, words: tuple[str, ...]) -> str:
    word = rng.choice(words)[:length]
    return rng.choice((word, word.capitalize(), word.upper()))


def training_text(rng: random.Random, longest: int) -> str:
    """Draw a string to train on, at most ``longest`` characters: digits, letters, words, prices and codes."""
    while True:
        length = rng.randint(1, min(longest, 6))
        kind = rng.random()
        if kind < 0.6:
            text = _draw(rng, DIGITS, length)
        elif kind < 0.75:
            text = _draw(rng, ALPHANUMERIC, length)
        elif kind < 0.9:
            text = _word(rng, longest, TRAIN_WORDS)
        else:
            text = _amount(rng, longest)
        if not held_out(text):
            return text


def measured_text(rng: random.Random, kind: str) -> str:
    """Draw a held-out string: ``"digits"`` (3 to 6), ``"letters"`` (3 to 6, digits among them) or ``"words"``."""
    if kind == "words":
        return _word(rng, 9, HELD_OUT_WORDS)
    alphabet = {"digits": DIGITS, "letters": ALPHANUMERIC}[kind]
    while not held_out(text := _draw(rng, alphabet, rng.randint(3, 6))):
        pass
    return text
