"""Rows that say the same about the same images, and images that are both trained and evaluated on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvlm_cli.data.row import Row


def duplicates(train: Sequence[Row], evaluate: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (place, place of its first occurrence) of every row whose conversation and images occurred before."""
    first: dict[str, str] = {}
    found: list[tuple[str, str]] = []
    for row in [*train, *evaluate]:
        conversation = _conversation(row)
        images = [_digest(source) for source in [*conversation.images, *conversation.videos]]
        key = json.dumps([conversation.messages, images], sort_keys=True, default=repr)
        if key in first:
            found.append((row.place, first[key]))
        else:
            first[key] = row.place
    return found


def shared_images(train: Sequence[Row], evaluate: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (place in the evaluation data, place in the training data) of rows that show the same image."""
    shown = {_digest(source): row.place for row in reversed(train) for source in _conversation(row).images}
    pairs = [(row, _digest(source)) for row in evaluate for source in _conversation(row).images]
    return [(row.place, shown[digest]) for row, digest in pairs if digest in shown]


def _conversation(row: Row) -> Any:
    from fvlm_vision.samples import read_sample

    return read_sample(row.sample)


def _digest(source: Any) -> str:
    """Return a name of an image's content: equal files have equal names, wherever they lie."""
    if isinstance(source, Mapping):
        given = [
            source[key]
            for key in ("bytes", "path", "image", "video", "frames", "url", "base64")
            if source.get(key) is not None
        ]
        return _digest(given[0]) if given else repr(source)
    if isinstance(source, list):  # a video's frames
        return hashlib.sha256("".join(map(_digest, source)).encode()).hexdigest()
    if isinstance(source, bytes | bytearray):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, str) and not source.startswith("data:") and "://" not in source and Path(source).is_file():
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return hashlib.sha256(str(source).encode()).hexdigest()
