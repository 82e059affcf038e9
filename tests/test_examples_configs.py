"""`examples/configs`: each is what `fvlm init` writes, and fits a tiny model of its family and data of its format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fvlm_cli.config.read import read_config
from fvlm_cli.config.starts import FAMILIES, FORMATS
from fvlm_cli.config.write import start_config
from fvlm_cli.output import Output
from fvlm_cli.preview.look import look
from fvlm_core.testing import tiny_checkpoint

CONFIGS = Path(__file__).resolve().parent.parent / "examples/configs"
ANSWERS = [f"number {row}" for row in range(4)]
ROWS = {"mix": (12, 2), "stream": (4, 4)}  # to train and to evaluate on, where it is not three and one


def named(path: Path) -> tuple[str, str]:
    family, _, data = path.stem.partition("-")
    return family, data or "messages"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same four rows in every format, under the names that the configs give."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("data")
    for kind in FORMATS:
        folder = root / kind / "images"
        folder.mkdir(parents=True)
        for row, answer in enumerate(ANSWERS):
            Image.new("RGB", (112, 112), (60 * row, 20, 90)).save(folder / f"{row}.png")
            if kind == "mix":
                photos = root / kind / "photos"
                photos.mkdir(exist_ok=True)
                Image.new("RGB", (112, 112), (9, 20, 60 * row)).save(photos / f"{row}.png")
                (photos / f"{row}.txt").write_text(answer, encoding="utf-8")
            if kind == "folder":
                (folder / f"{row}.txt").write_text(answer, encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"question": "Read it.", "answer": answer, "file": f"images/{row}.png"} for row, answer in enumerate(ANSWERS)
    ]
    turns = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": row["file"]}, {"type": "text", "text": "Read it."}],
            },
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in rows
    ]
    jsonl = "\n".join(json.dumps({"messages": turn}) for turn in turns)
    for name in ("messages/train", "mix/receipts", "stream/train", "stream/eval"):
        (root / f"{name}.jsonl").write_text(jsonl, encoding="utf-8")
    prompts = [{**row, "image": row["file"]} for row in rows]
    (root / "prompt/train.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    llava = [
        {
            "conversations": [
                {"from": "human", "value": "<image>\nRead it."},
                {"from": "gpt", "value": row["answer"]},
            ],
            "image": Path(row["file"]).name,
        }
        for row in rows
    ]
    (root / "sharegpt/train.json").write_text(json.dumps(llava), encoding="utf-8")
    with (root / "csv/train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pixels = [{"bytes": (root / "csv" / row["file"]).read_bytes(), "path": None} for row in rows]
    table = [
        {"prompt": "Read it.", "completion": row["answer"], "images": [picture]}
        for row, picture in zip(rows, pixels, strict=True)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), root / "parquet/train.parquet")
    return root


def test_there_is_one_for_each_family_and_each_format() -> None:
    found = {named(path) for path in CONFIGS.glob("*.yaml")}
    assert {family for family, _ in found} == set(FAMILIES)
    assert {kind for _, kind in found} == set(FORMATS)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_is_what_init_writes_and_fits_its_family_and_data(
    path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, kind = named(path)
    assert path.read_text(encoding="utf-8") == start_config(family, kind, None, None)
    base = tiny_checkpoint(family, tmp_path / "base")
    monkeypatch.chdir(data / kind)
    config = read_config(path, [f"model.name={base}"])
    found = look(config, Output(quiet=True), show=4, check=0)
    rows, aside = ROWS.get(kind, (3, 1))
    assert (found.rows, found.eval_rows) == (rows, aside)
    assert found.fates == {"whole": rows, "truncated": 0, "skipped": 0, "refused": 0}
    for shown in found.shown:
        trained = "".join(piece.text for piece in shown.pieces if piece.kind == "trained")
        assert any(answer in trained for answer in ANSWERS)
        assert "Read it." not in trained
        assert "Describe" not in trained
        (image,) = shown.images
        assert image.tokens > 0
