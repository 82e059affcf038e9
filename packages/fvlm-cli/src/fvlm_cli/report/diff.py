"""How an answer differs from the truth, character by character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

Mark = Literal["same", "extra", "missing"]


@dataclass(frozen=True)
class Part:
    """A run of characters that the answer has as the truth does, has beside it, or lacks."""

    text: str
    mark: Mark


def parts(answer: str, truth: str) -> list[Part]:
    """Return the answer as runs of characters; what is replaced is missing and then extra.

    The same and extra runs together are the answer, the same and missing ones the truth.
    """
    found: list[Part] = []
    for step in Levenshtein.opcodes(truth, answer):
        meant, written = truth[step.src_start : step.src_end], answer[step.dest_start : step.dest_end]
        if step.tag == "equal":
            found.append(Part(meant, "same"))
            continue
        if meant:
            found.append(Part(meant, "missing"))
        if written:
            found.append(Part(written, "extra"))
    return found
