"""Where a sample's image and video files are, and whether the images are images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvlm_cli.data.row import Row

_COLUMNS = ("image", "images", "video", "videos")
_PATH_KEYS = ("image", "video", "path", "frames")


def resolve_images(sample: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the sample with its relative paths of images and videos, in columns and blocks, made to start at `folder`.

    Addresses (`https://…`), data URIs and embedded images stay as they are. The sample is not changed.
    """
    resolved = dict(sample)
    for name in _COLUMNS:
        if name in resolved:
            resolved[name] = _resolve(resolved[name], folder)
    for name in ("messages", "conversations", "prompt", "completion"):
        turns = resolved.get(name)
        if isinstance(turns, list):
            resolved[name] = [_resolve_turn(turn, folder) for turn in turns]
    return resolved


def _resolve_turn(turn: Any, folder: Path) -> Any:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list):
        return turn
    return {**turn, "content": [_resolve_block(block, folder) for block in turn["content"]]}


def _resolve_block(block: Any, folder: Path) -> Any:
    is_medium = isinstance(block, Mapping) and block.get("type") in ("image", "video")
    return _resolve(block, folder) if is_medium else block


def _resolve(source: Any, folder: Path) -> Any:
    if isinstance(source, str):
        return source if source.startswith("data:") or "://" in source else str(folder / Path(source).expanduser())
    if isinstance(source, list):
        return [_resolve(item, folder) for item in source]
    if isinstance(source, Mapping) and source.get("bytes") is None:
        return {key: _resolve(value, folder) if key in _PATH_KEYS else value for key, value in source.items()}
    return source


def check_images(row: Row, sources: list[Any]) -> None:
    """Check that those of a row's images that are files exist and begin as images do; none is decoded.

    Raises:
        DataError: one is missing or no image; the message has the row's place.
    """
    from PIL import Image, UnidentifiedImageError

    for source in sources:
        path = _file_of(source)
        if path is None:
            continue
        try:
            with Image.open(path):
                pass
        except UnidentifiedImageError:
            raise row.refuse(f"{path} is no image that can be read; replace it or drop the row.") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise row.refuse(f"the image {path} cannot be read ({reason}); correct the path.") from None
        except Image.DecompressionBombError:
            raise row.refuse(f"the image {path} is too large to be decoded safely; shrink it.") from None


def _file_of(source: Any) -> str | None:
    if isinstance(source, Mapping):
        keys = [key for key in _PATH_KEYS if source.get(key) is not None]
        return None if source.get("bytes") is not None or len(keys) != 1 else _file_of(source[keys[0]])
    if not isinstance(source, str) or source.startswith("data:") or "://" in source:
        return None
    return source
