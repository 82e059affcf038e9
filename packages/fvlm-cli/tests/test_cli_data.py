"""Training data from files and folders: the same sample from each, and the place of each that is bad."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fvlm_cli.config.schema import DataSection
from fvlm_cli.data.read import read_data
from fvlm_cli.data.row import Row, locate
from fvlm_core.errors import ConfigError, DataError


def read(train: Path | list[Path], seed: int = 0, **options: Any) -> tuple[list[Row], list[Row]]:
    sources = str(train) if isinstance(train, Path) else [str(path) for path in train]
    return read_data(DataSection(train=sources, **options), seed, lambda rows, total: rows)


def samples(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [row.sample for row in rows]


def message(train: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(train, **options)
    return str(caught.value)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_jsonl_json_csv_and_parquet_give_the_same_rows(tmp_path: Path, image: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"what, is {n}?", "completion": f"number\n{n}", "image": "a.png"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = [{**row, "image": str(image)} for row in rows]
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet"):
        assert samples(read(tmp_path / name)[0]) == expected, name


def test_files_are_joined_limited_and_split_by_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [json.dumps({"prompt": f"{name}{n}", "completion": "x"}) for n in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert [row.sample["prompt"] for row in read(files, limit=12)[0]] == [f"a{n}" for n in range(10)] + ["b0", "b1"]
    train, aside = read(files, eval_fraction=0.25)
    assert (len(train), len(aside)) == (15, 5)
    everything = {row.sample["prompt"] for row in [*train, *aside]}
    assert len(everything) == 20
    assert samples(read(files, eval_fraction=0.25)[1]) == samples(aside)
    assert samples(read(files, seed=1, eval_fraction=0.25)[1]) != samples(aside)


def test_columns_are_renamed(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a", "photo": "a.png", "prompt": "old"}), encoding="utf-8")
    columns = {"prompt": "question", "completion": "answer", "image": "photo"}
    assert samples(read(path, columns=columns)[0]) == [{"prompt": "q", "completion": "a", "image": str(image)}]
    said = message(path, columns={"prompt": "questoin"})
    assert "rows.jsonl, line 1: it has no column questoin" in said
    assert "did you mean question?" in said
    with pytest.raises(ConfigError, match="did you mean completion"):
        read(path, columns={"completions": "answer"})


def test_relative_images_start_at_their_file_or_the_folder_given(tmp_path: Path, image: Path) -> None:
    block = {"type": "image", "path": "a.png"}
    row = {"messages": [{"role": "user", "content": [block]}, {"role": "assistant", "content": "x"}]}
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "rows.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    assert "rows.json, row 0: the image" in message(path)
    (found,) = samples(read(path, image_folder=str(tmp_path))[0])
    assert found["messages"][0]["content"][0]["path"] == str(image)


def test_addresses_and_embedded_images_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "q", "completion": "a", "images": ["data:image/png;base64,AAAA", "https://example.org/a.png"]}
    path.write_text(json.dumps(row), encoding="utf-8")
    assert samples(read(path)[0]) == [row]


def test_folder_with_captions_beside_the_images(tmp_path: Path) -> None:
    for name in ("b", "a"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text(f" caption {name}\n", encoding="utf-8")
    rows = samples(read(tmp_path, caption_prompt="Say it.")[0])
    assert [(row["prompt"], row["completion"], Path(row["image"]).name) for row in rows] == [
        ("Say it.", "caption a", "a.jpg"),
        ("Say it.", "caption b", "b.jpg"),
    ]
    (tmp_path / "a.txt").unlink()
    assert "a.jpg: it has no caption" in message(tmp_path)


def test_folder_with_metadata(tmp_path: Path, image: Path) -> None:
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "caption": "two", "prompt": "Which?"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = samples(read(tmp_path)[0])
    assert [(row["prompt"], row["completion"], row["image"]) for row in rows] == [
        ("Describe this image.", "one", str(image)),
        ("Which?", "two", str(image)),
    ]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"}), encoding="utf-8")
    assert "metadata.jsonl, line 1: it has no caption" in message(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "q", "completion": "a"}\n{"prompt": ', "a.jsonl, line 2: it is not valid JSON"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: it holds a list"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", '{"text": "q"}', "a.jsonl, line 1: a sample has the columns ['text']"),
        ("a.jsonl", '{"messages": []}', "a.jsonl, line 1: the column 'messages' is an empty conversation"),
        ("a.jsonl", '{"messages": [{"role": "boss", "content": "x"}]}', "line 1: a message has the role 'boss'"),
        ("a.jsonl", '{"prompt": "q", "completion": "a", "image": "no.png"}', "line 1: the image"),
        ("a.jsonl", '{"prompt": "q", "completion": "a", "image": "a.jsonl"}', "is no image that can be read"),
        ("a.jsonl", "[" * 100_000, "line 1: its JSON is nested too deeply"),
        ("a.json", '{"prompt": "q"}', "a.json holds an object; give a list"),
        ("a.json", '[{"prompt": "q", "completion": "a"}, 3]', "a.json, row 1: it holds a number"),
        ("a.csv", "prompt,completion\nq,a,b\n", "a.csv, row 0: it has more cells"),
        ("a.csv", 'prompt,completion\n"q,a\n', "it is not valid CSV"),
        ("a.parquet", "nonsense", "not a valid Parquet file"),
        ("a.txt", "x", "is not of a kind that can be read"),
    ],
)
def test_bad_files_and_rows_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert said in message(tmp_path / name)


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    assert "a.jsonl cannot be read (No such file or directory)" in message(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    assert "not UTF-8 text" in message(tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in message(tmp_path / "empty")


def test_a_row_number_becomes_a_place() -> None:
    rows = [Row({}, "a.jsonl, line 1"), Row({}, "a.jsonl, line 3")]
    assert str(locate(DataError("it is bad.", 1), rows)) == "a.jsonl, line 3: it is bad."
    assert str(locate(DataError("it is bad."), rows)) == "it is bad."
