"""A row of token ids as readable pieces, each trained, masked, media or cut off."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["trained", "masked", "media", "cut"]

_BROKEN = "\ufffd"  # what a tokenizer gives for a part of a character
_LONGEST = 8  # tokens that one character may be spread over, and then some


@dataclass(frozen=True)
class Piece:
    """A few tokens that read as text together.

    Attributes:
        text: decoded, special tokens included.
        kind: what happens to them in training.
        ids: the tokens.
    """

    text: str
    kind: Kind
    ids: tuple[int, ...]


def pieces(
    tokenizer: Any, ids: Sequence[int], learned: Sequence[bool], media: Collection[int], kept: int
) -> list[Piece]:
    """Return a row token by token; tokens that make up one character stand together, and so do those of an image.

    Args:
        tokenizer: of the processor.
        ids: the row without padding.
        learned: for each token, whether its label is it.
        media: the ids that stand for media.
        kept: how many leading tokens training keeps.
    """
    kinds: list[Kind] = [
        "cut" if place >= kept else "media" if token in media else "trained" if learned[place] else "masked"
        for place, token in enumerate(ids)
    ]
    found: list[Piece] = []
    start = 0
    while start < len(ids):
        end = start + 1
        same_kind = _run(kinds, start)
        if kinds[start] == "media":
            end = _same_ids(ids, start, same_kind)
        else:
            while _BROKEN in tokenizer.decode(ids[start:end]) and end < min(same_kind, start + _LONGEST):
                end += 1
        found.append(Piece(tokenizer.decode(ids[start:end]), kinds[start], tuple(ids[start:end])))
        start = end
    return found


def _run(kinds: Sequence[Kind], start: int) -> int:
    end = start
    while end < len(kinds) and kinds[end] == kinds[start]:
        end += 1
    return end


def _same_ids(ids: Sequence[int], start: int, stop: int) -> int:
    end = start
    while end < stop and ids[end] == ids[start]:
        end += 1
    return end
