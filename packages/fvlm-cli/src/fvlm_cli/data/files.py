"""JSONL, JSON, CSV and Parquet files → rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fvlm_cli.data.row import Row
from fvlm_core.errors import DataError

_PARQUET_ROWS = 64  # rows decoded at a time; their images may be large


def read_file(path: Path) -> list[Row]:
    """Read all rows of a file, as `iterate_file` yields them."""
    return list(iterate_file(path))


def iterate_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file. Only JSON is read as a whole; of the other kinds a little at a time.

    Args:
        path: a `.jsonl`, `.json`, `.csv` or `.parquet` file.

    Raises:
        DataError: the file is missing, of another kind, damaged, or empty; the message says where.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None and not path.exists():
        raise DataError(f"{path} is not here; check the path.")
    if reader is None:
        raise DataError(f"{path} is not of a kind that can be read; give one of {', '.join(READERS)}, or a folder.")
    empty = True
    try:
        for row in reader(path):
            empty = False
            yield row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the path.") from None
    if empty:
        raise DataError(f"{path} holds no rows; give a file that does.")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield Row(_object(_loads(line, place), place), place)


def _json(path: Path) -> Iterator[Row]:
    value = _loads(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path} holds {_kind(value)}; give a list of samples.")
    for number, item in enumerate(value):
        place = f"{path}, row {number}"
        yield Row(_object(item, place), place)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # a cell may hold a whole conversation; the default is 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey="", strict=True)
        try:
            for number, cells in enumerate(reader):
                place = f"{path}, row {number}"
                if "" in cells:
                    raise DataError(f"{place}: it has more cells than the header has names; quote cells with commas.")
                yield Row({name: _cell(name, text, place) for name, text in cells.items() if text}, place)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: it is not valid CSV ({error}).") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for sample in batch.to_pylist():
                    yield Row(sample, f"{path}, row {number}")
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a valid Parquet file ({str(error).splitlines()[0]}); write it again.") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _cell(name: str, text: str, place: str) -> Any:
    """Return a CSV cell: conversations are JSON, all else is text."""
    return _loads(text, f"{place}, column {name}") if name in ("messages", "conversations") else text


def _loads(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: it is not valid JSON ({error.msg} at {_spot(text, error)}).") from None
    except RecursionError:
        raise DataError(f"{place}: its JSON is nested too deeply to be a sample.") from None


def _spot(text: str, error: json.JSONDecodeError) -> str:
    return f"column {error.colno}" if "\n" not in text.rstrip("\n") else f"line {error.lineno}, column {error.colno}"


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: it holds {_kind(value)}; give an object with messages, or prompt and completion.")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
