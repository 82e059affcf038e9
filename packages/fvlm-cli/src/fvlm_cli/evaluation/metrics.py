"""How near answers come to the truth: exact match, character and word error rate, ANLS.

All compare texts without the white space around them. Exact match, character error rate and word error rate are strict
about case and inner white space (words are what white space separates). ANLS is the average normalized Levenshtein
similarity of Biten et al., "Scene Text Visual Question Answering" (ICCV 2019): 1 - distance / length of the longer
text, 0 where that share is 0.5 or more, case ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

Metric = Literal["exact_match", "cer", "wer", "anls"]
METRICS: tuple[Metric, ...] = ("exact_match", "cer", "wer", "anls")

_ANLS_LIMIT = 0.5


@dataclass(frozen=True)
class Score:
    """One answer against its truth.

    Attributes:
        exact_match: 1 or 0.
        edits: characters to insert, delete or replace.
        characters: in the truth.
        word_edits: the same for words.
        words: in the truth.
        anls: from 0 to 1.
    """

    exact_match: int
    edits: int
    characters: int
    word_edits: int
    words: int
    anls: float

    def value(self, metric: Metric) -> float:
        """Return one metric of this answer alone. An error rate of an empty truth counts it as of length 1."""
        if metric == "cer":
            return self.edits / max(1, self.characters)
        if metric == "wer":
            return self.word_edits / max(1, self.words)
        return float(self.exact_match if metric == "exact_match" else self.anls)


def score(answer: str, truth: str) -> Score:
    """Compare one answer with its truth."""
    answer, truth = answer.strip(), truth.strip()
    words, true_words = answer.split(), truth.split()
    lower, true_lower = answer.lower(), truth.lower()
    longest = max(len(lower), len(true_lower))
    share = Levenshtein.distance(lower, true_lower) / longest if longest else 0.0
    return Score(
        exact_match=int(answer == truth),
        edits=Levenshtein.distance(answer, truth),
        characters=len(truth),
        word_edits=Levenshtein.distance(words, true_words),
        words=len(true_words),
        anls=0.0 if share >= _ANLS_LIMIT else 1.0 - share,
    )


def summary(scores: Sequence[Score], metrics: Sequence[Metric] = METRICS) -> dict[str, float]:
    """Return each metric over all answers.

    Error rates are those of the whole text: all edits by all characters (words) of the truths, so that long rows weigh
    more. The others are means over the rows.
    """
    totals: dict[Metric, float] = {
        "exact_match": sum(item.exact_match for item in scores) / max(1, len(scores)),
        "cer": sum(item.edits for item in scores) / max(1, sum(item.characters for item in scores)),
        "wer": sum(item.word_edits for item in scores) / max(1, sum(item.words for item in scores)),
        "anls": sum(item.anls for item in scores) / max(1, len(scores)),
    }
    return {metric: totals[metric] for metric in metrics}
