"""Which image or video stands where in a conversation: inline ones, and those of a column."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from fvlm_core.errors import DataError

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")


class Places:
    """The media of one sample: those inline, and those of its columns, in the order of their places.

    Args:
        columns: the sample; `images` or `image`, `videos` or `video` are read. A `video` is one video, also where it is
            a list of frames.

    Raises:
        DataError: both columns of a kind are there.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._of = {kind: _OfKind(kind, columns) for kind in KINDS}
        marks = "|".join(f"<{kind}>" for kind in KINDS if self._of[kind].has_column)
        self._marks = re.compile(f"({marks})") if marks else None

    def media(self, kind: Kind) -> list[Any]:
        """Return the sources of a kind, in the order of their blocks."""
        return self._of[kind].media

    def block(self, kind: Kind, source: Any = None) -> dict[str, Any]:
        """Return the block of a medium; without a source of its own it takes the next of the column."""
        self._of[kind].add(source)
        return {"type": kind}

    def split(self, text: str) -> list[dict[str, Any]]:
        """Cut `<image>` and `<video>` out of a text, where the sample has a column that they can stand for."""
        if self._marks is None or not text:
            return [{"type": "text", "text": text}]
        marks: dict[str, Kind] = {f"<{kind}>": kind for kind in KINDS}
        pieces = self._marks.split(text)  # text, mark, text, mark, …
        return [
            self.block(marks[piece]) if number % 2 else {"type": "text", "text": piece}
            for number, piece in enumerate(pieces)
            if piece
        ]

    def close(self, messages: list[dict[str, Any]]) -> None:
        """Put a column's media before the first user text when no place for them was marked; check the numbers.

        Raises:
            DataError: the numbers differ, or there is no user turn.
        """
        for kind in reversed(KINDS):  # each goes to the front: images end up before videos
            self._of[kind].close(messages)


class _OfKind:
    """The media of one kind."""

    def __init__(self, kind: Kind, columns: Mapping[str, Any]) -> None:
        many, one = f"{kind}s", kind
        if many in columns and one in columns:
            raise DataError(f"a sample has both the columns {one!r} and {many!r}; keep one.")
        column = columns.get(many, columns.get(one))
        self.kind = kind
        self.has_column = column is not None
        self.column: list[Any] = [column] if kind == "video" and one in columns else _as_list(column)
        self.media: list[Any] = []
        self._places = 0  # blocks without a source of their own
        self._next = 0

    def add(self, source: Any) -> None:
        if source is not None:
            self.media.append(source)
            return
        self._places += 1
        if self._next < len(self.column):
            self.media.append(self.column[self._next])
            self._next += 1

    def close(self, messages: list[dict[str, Any]]) -> None:
        if self.column and self._places == 0:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                raise DataError(
                    f"a sample has {_number(len(self.column), self.kind)} and no user turn to put them in; add one."
                )
            content = first["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            first["content"] = [{"type": self.kind} for _ in self.column] + blocks
            # Inline media of earlier turns come first, those of this turn and later ones after the column's.
            before = sum(self._blocks(m) for m in messages[: messages.index(first)])
            self.media[before:before] = self.column
        elif self._places != len(self.column):
            raise DataError(
                f"a sample has {_number(self._places, f'{self.kind} placeholder')} and "
                f"{_number(len(self.column), self.kind)}; give one {self.kind} for each placeholder."
            )

    def _blocks(self, message: Mapping[str, Any]) -> int:
        content = message["content"]
        return 0 if isinstance(content, str) else sum(block["type"] == self.kind for block in content)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
