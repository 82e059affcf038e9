"""One training sample and where it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fvlm_core.errors import DataError


@dataclass(frozen=True)
class Row:
    """A sample as its file holds it, and its place for errors: "train.jsonl, line 3"."""

    sample: dict[str, Any]
    place: str

    def refuse(self, reason: str) -> DataError:
        """Return the error that this row cannot be used."""
        return DataError(f"{self.place}: {reason}")


def locate(error: DataError, rows: list[Row]) -> DataError:
    """Return an error that knows its row number with the row's place instead."""
    if error.row is None or not 0 <= error.row < len(rows):
        return error
    return rows[error.row].refuse(error.reason)
