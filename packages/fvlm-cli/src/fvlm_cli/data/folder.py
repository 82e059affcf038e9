"""A folder of images with captions → rows of prompt + completion.

The captions stand in a `.txt` file beside each image, or in a `metadata.jsonl` or `metadata.csv` whose rows have
`file_name` and `text` (or `caption`), and may have a `prompt` of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fvlm_cli.data.files import iterate_file
from fvlm_cli.data.row import Row
from fvlm_core.errors import DataError

_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_METADATA = ("metadata.jsonl", "metadata.csv")


def iterate_folder(folder: Path, prompt: str) -> Iterator[Row]:
    """Yield the rows of a folder of images with captions, subfolders included, in the order of their names.

    Args:
        folder: the folder.
        prompt: what is asked about an image that has no prompt of its own.

    Raises:
        DataError: the folder has no image, or an image has no caption; the message names it.
    """
    listed = [name for name in _METADATA if (folder / name).is_file()]
    if len(listed) > 1:
        raise DataError(f"{folder} has both {' and '.join(listed)}; keep one.")
    empty = True
    for row in _from_metadata(folder / listed[0], prompt) if listed else _from_texts(folder, prompt):
        empty = False
        yield row
    if empty:
        raise DataError(f"{folder} holds no image; give a folder of {', '.join(sorted(_IMAGES))} files with captions.")


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder and its subfolders, by name."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _IMAGES and path.is_file()]


def _from_texts(folder: Path, prompt: str) -> Iterator[Row]:
    for path in image_files(folder):
        text = path.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            raise DataError(f"{path}: it has no caption; write {text.name} beside it, or remove it.") from None
        except UnicodeDecodeError:
            raise DataError(f"{text}: it is not UTF-8 text; convert it.") from None
        if not caption:
            raise DataError(f"{text}: the caption is empty; write one, or remove the image.")
        yield Row({"prompt": prompt, "completion": caption, "image": str(path)}, str(path))


def _from_metadata(path: Path, prompt: str) -> Iterator[Row]:
    for row in iterate_file(path):
        name = row.sample.get("file_name")
        caption = row.sample.get("text", row.sample.get("caption"))
        if not isinstance(name, str) or not name:
            raise row.refuse("it has no file_name; name the image, relative to the folder.")
        if not isinstance(caption, str) or not caption.strip():
            raise row.refuse("it has no caption; give it as text or caption.")
        asked = row.sample.get("prompt") or prompt
        image = str(path.parent / name)
        yield Row({"prompt": asked, "completion": caption.strip(), "image": image}, row.place)
