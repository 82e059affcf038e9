"""Several datasets in one run: their own columns and folders, their shares, and none of a row on both sides."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fvlm_cli.config.read import read_config
from fvlm_cli.config.schema import DataSection
from fvlm_cli.data.mix import counts, interleaved, mixed, shuffled
from fvlm_cli.data.read import read_data
from fvlm_cli.data.row import Row
from fvlm_core.errors import ConfigError, DataError


def read(seed: int = 0, **options: Any) -> tuple[list[Row], list[Row]]:
    return read_data(DataSection.model_validate(options), seed, lambda rows, total: rows)


def names(rows: list[Row]) -> list[str]:
    return [row.sample["prompt"] for row in rows]


def write(path: Path, name: str, count: int, **more: Any) -> str:
    lines = [json.dumps({"prompt": f"{name}{n}", "completion": "x", **more}) for n in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("sizes", "weights", "mixing", "limit", "expected"),
    [
        ([10, 10], [1, 1], "oversample", None, [10, 10]),
        ([10, 40], [1, 1], "oversample", None, [40, 40]),
        ([10, 40], [1, 1], "undersample", None, [10, 10]),
        ([10, 40], [3, 1], "oversample", None, [120, 40]),
        ([10, 40], [3, 1], "undersample", None, [10, 3]),
        ([10, 40], [3, 1], "oversample", 20, [15, 5]),
        ([100, 1], [100, 1], "undersample", None, [100, 1]),
        ([10, 10], [1, 1], "oversample", 3, [1, 2]),
        ([10, 10, 10], [1, 1, 1], "oversample", 5, [1, 2, 2]),
        ([10, 40], [1, 3], "oversample", 1, [0, 1]),
    ],
)
def test_each_dataset_has_its_share(
    sizes: list[int], weights: list[float], mixing: Any, limit: int | None, expected: list[int]
) -> None:
    assert counts(sizes, weights, mixing, limit) == expected


@pytest.mark.parametrize("more", [{"split": "test"}, {"subset": "en"}, {"revision": "v1"}])
def test_what_is_for_the_hub_is_refused_for_a_file(tmp_path: Path, more: dict[str, str]) -> None:
    path = write(tmp_path / "a.jsonl", "a", 2)
    ((name, value),) = more.items()
    with pytest.raises(ConfigError, match=rf"^data.train\[1\].{name} is '{value}', which is for .*a.jsonl is"):
        read(train=[path, {"path": path, **more}])


def test_rows_are_repeated_evenly_and_chosen_by_seed() -> None:
    parts = ["abc", "uvwxyz"]
    found = Counter(mixed(parts, [8, 2], seed=1))
    assert sorted(found[letter] for letter in "abc") == [2, 3, 3]
    assert sum(found[letter] for letter in "uvwxyz") == 2
    assert mixed(parts, [8, 2], seed=1) == mixed(parts, [8, 2], seed=1)
    assert len({tuple(mixed(parts, [8, 2], seed=seed)) for seed in range(9)}) > 1


def test_streams_are_drawn_by_weight_and_end_as_asked() -> None:
    def start(name: str, count: int) -> Iterator[str]:
        return (f"{name}{n}" for n in range(count))

    starts = [partial(start, "a", 100), partial(start, "b", 4000)]
    over = list(interleaved(starts, [1, 3], "oversample", "seed"))
    assert set(over) == set(chain(start("a", 100), start("b", 4000)))
    share = sum(item.startswith("b") for item in over) / len(over)
    assert 0.72 < share < 0.78
    under = list(interleaved(starts, [1, 3], "undersample", "seed"))
    assert len(set(under)) == len(under)
    assert {item for item in under if item.startswith("a")} == set(start("a", 100))
    assert over == list(interleaved(starts, [1, 3], "oversample", "seed"))


def test_a_shuffle_buffer_loses_nothing_and_one_keeps_the_order() -> None:
    items = list(range(500))
    found = list(shuffled(iter(items), 50, "seed"))
    assert sorted(found) == items
    assert found != items
    assert all(number <= place + 50 for place, number in enumerate(found[:400]))  # none comes before it was read
    assert list(shuffled(iter(items), 1, "seed")) == items
    assert list(shuffled(iter(items[:3]), 50, "seed")) != [] == list(shuffled(iter([]), 50, "seed"))


def test_datasets_are_mixed_with_columns_and_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photos/a.png")
    plain = write(tmp_path / "plain.jsonl", "p", 30)
    named = tmp_path / "named.jsonl"
    named.write_text(json.dumps({"question": "q0", "answer": "x", "photo": "a.png"}), encoding="utf-8")
    own = {"prompt": "question", "completion": "answer", "image": "photo"}
    second = {"path": str(named), "weight": 1.0, "columns": own, "image_folder": str(tmp_path / "photos")}
    train, _ = read(train=[{"path": plain, "weight": 3.0}, second])
    assert Counter(name[0] for name in names(train)) == {"p": 30, "q": 10}
    assert {row.sample["image"] for row in train if "image" in row.sample} == {str(tmp_path / "photos/a.png")}
    with pytest.raises(ConfigError, match=r"data\.train\[1\]\.columns: promt is no column .* did you mean prompt\?"):
        read(train=[{"path": plain, "weight": 1.0}, {**second, "columns": {"promt": "question"}}])


def test_rows_that_are_set_aside_are_not_among_the_repeated(tmp_path: Path) -> None:
    few, many = write(tmp_path / "few.jsonl", "f", 8), write(tmp_path / "many.jsonl", "m", 80)
    train, aside = read(train=[{"path": few, "weight": 1.0}, {"path": many, "weight": 1.0}], eval_fraction=0.25)
    assert Counter(name[0] for name in names(train)) == {"f": 60, "m": 60}
    assert Counter(name[0] for name in names(aside)) == {"f": 2, "m": 20}
    assert not set(names(train)) & set(names(aside))


def test_a_dataset_of_which_nothing_can_be_used_is_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", "g", 4)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "no completion"}', encoding="utf-8")
    refused: list[DataError] = []
    data = DataSection.model_validate({"train": [{"path": good, "weight": 1.0}, {"path": str(bad), "weight": 1.0}]})
    with pytest.raises(DataError, match=r"bad\.jsonl: none of its rows can be used"):
        read_data(data, 0, lambda rows, total: rows, refused)
    assert "bad.jsonl, line 1" in str(refused[0])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data.train=[{path: a, weight: 2}, b]"], "data.train[1] has no weight"),
        (
            ["data.train=[{path: a, wieght: 2}, b]"],
            "[0].wieght is not a key of a dataset; did you mean weight?",
        ),
        (["data.train=[{path: a, weight: -2}]"], "data.train[0].weight should be greater than 0"),
        (["data.train={weight: 1}"], "data.train.path is missing"),
        (["data.train=[a, b]", "data.mixing=undersample"], "data.mixing is given and no dataset"),
        (["data.streaming=true"], "give train.max_steps"),
        (["data.streaming=true", "train.max_steps=2", "data.eval_fraction=0.1"], "give data.eval"),
        (["data.shuffle_buffer=4"], "needs data.streaming"),
        (["data.eval={path: a, weight: 1}"], "data.eval has a weight"),
    ],
)
def test_settings_that_go_wrong_together(tmp_path: Path, words: list[str], part: str) -> None:
    (tmp_path / "c.yaml").write_text("model: {name: m}\ndata: {train: a.jsonl}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "c.yaml", words)
    assert part in str(caught.value)
