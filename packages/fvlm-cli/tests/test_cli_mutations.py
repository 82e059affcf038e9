"""Two hundred configs and data files that are wrong in some way: no traceback, and every message names key or row."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from fvlm_cli.config.schema import SourceSection, TrainConfig
from fvlm_cli.main import app
from fvlm_cli.quickstart.folders import shipped_checkpoint

# Any text may be a model's name on the Hub, which is not asked here.
KEYS = [
    (section, key)
    for section, field in TrainConfig.model_fields.items()
    for key in field.annotation.model_fields
    if (section, key) != ("model", "name")
]
QUIET = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, -1.5, 0.5, 1e400, float("nan"), 2**63]),
    st.sampled_from(
        ["", "abc", " ", "nul\0", "ä€😀", "${oc.env:FVLM_NOT_SET}", "${lora.nowhere}", "a" * 5000, "[INST]"]
    ),
    st.sampled_from([[], [1], [None], ["a", 1], {}, {"a": 1}, {"prompt": "nowhere"}, [[]], [0, 5], [64, 64]]),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    Image.new("RGB", (64, 32), "red").save(folder / "a.png")
    return folder


def config() -> dict[str, Any]:
    return {
        "model": {"name": str(shipped_checkpoint()), "max_seq_length": 128},
        "lora": {"r": 4},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.3, "train_on_responses_only": True},
        "train": {"max_steps": 1},
        "eval": {"rows": 1},
        "save": {"output_dir": "run"},
    }


def rows() -> list[dict[str, Any]]:
    block = {"type": "image", "image": "a.png"}
    question = {"role": "user", "content": [block, {"type": "text", "text": "Read it."}]}
    return [{"messages": [question, {"role": "assistant", "content": f"{number}"}]} for number in range(4)]


def preview(place: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...] = ()) -> Any:
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["preview", "config.yaml", "-n", "1", "--json", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), (done.exception, done.stderr)
    assert done.exit_code in (0, 2, 3), done.stderr
    assert "Traceback" not in done.stderr
    return done


def complaint(done: Any) -> str:
    """What a failed call says is wrong."""
    found = json.loads(done.stdout.splitlines()[-1])
    return str(found["error"]) if "error" in found else "\n".join(found["refused"])


@QUIET
@given(where=st.sampled_from(KEYS), value=WEIRD, misspelt=st.sampled_from(["", "", "", "x", "_"]))
def test_a_config_with_one_wrong_value(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, str], value: Any, misspelt: str
) -> None:
    section, key = where
    wrong = config()
    wrong[section][key + misspelt] = value
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())), encoding="utf-8")
    (place / "config.yaml").write_text(yaml.safe_dump(wrong, allow_unicode=True), encoding="utf-8")
    done = preview(place, monkeypatch)
    if misspelt:
        assert done.exit_code == 2
    if done.exit_code:
        said = complaint(done)
        assert "\n" not in said.strip() or "line" in said
        names = (
            f"{section}.{key}",
            key,
            f"{section} is",
            *([value] if isinstance(value, str) and value.strip() else []),
        )
        assert any(name in said for name in names), said


@settings(QUIET, max_examples=40)
@given(key=st.sampled_from(sorted(SourceSection.model_fields)), value=WEIRD, misspelt=st.sampled_from(["", "", "s"]))
def test_a_dataset_with_one_wrong_value(
    place: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, misspelt: str
) -> None:
    wrong = config()
    wrong["data"]["train"] = [{"path": "rows.jsonl", "weight": 1.0, key + misspelt: value}]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())), encoding="utf-8")
    (place / "config.yaml").write_text(yaml.safe_dump(wrong, allow_unicode=True), encoding="utf-8")
    done = preview(place, monkeypatch)
    if misspelt:
        assert done.exit_code == 2
        assert f"data.train[0].{key}s is not a key of a dataset" in complaint(done)
    elif done.exit_code:
        said = complaint(done)
        names = ("data.train", "rows.jsonl", *([value] if isinstance(value, str) and value.strip() else []))
        assert any(name in said for name in names), said


def paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(path for key, child in children for path in paths(child, (*at, key)))]


@QUIET
@given(data=st.data(), number=st.integers(0, 3), value=WEIRD, drop=st.booleans())
def test_data_with_one_wrong_value(
    place: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, number: int, value: Any, drop: bool
) -> None:
    wrong: list[Any] = copy.deepcopy(rows())
    path = data.draw(st.sampled_from(paths(wrong[number])))
    holder: Any = wrong
    for step in (number, *path)[:-1]:
        holder = holder[step]
    last = (number, *path)[-1]
    if drop and path:
        del holder[last]
    else:
        holder[last] = value
    lines = [json.dumps(row) for row in wrong]
    (place / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (place / "config.yaml").write_text(yaml.safe_dump(config()), encoding="utf-8")
    done = preview(place, monkeypatch, ("data.eval_fraction=null", "eval.rows=null"))
    assert done.exit_code != 2
    if done.exit_code:
        assert f"rows.jsonl, line {number + 1}" in complaint(done)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("rows.jsonl", b"\xff\xfe{}", "not UTF-8"),
        ("rows.jsonl", b'{"messages": [', "line 1"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "line 2"),
        ("rows.jsonl", b"", "no rows"),
        ("rows.jsonl", b"\n\n", "no rows"),
        ("rows.jsonl", b"[" * 100_000, "line 1"),
        ("rows.jsonl", b"null", "line 1"),
        ("rows.json", b'{"messages": []}', "an object"),
        ("rows.json", b'[{"prompt": "a", "completion": "b"}, 3]', "row 1"),
        ("rows.csv", b"prompt,completion\na,b,c\n", "row 0"),
        ("rows.csv", b'prompt,completion\n"a,b\n', "rows.csv"),
        ("rows.csv", b"question,answer\na,b\n", "row 0"),
        ("rows.csv", b"messages\nnot json\n", "row 0, column messages"),
        ("rows.parquet", b"PAR1 and then nothing", "not a valid Parquet"),
        ("rows.xlsx", b"PK", "not of a kind"),
    ],
)
def test_files_that_are_broken(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, part: str
) -> None:
    (place / name).write_bytes(content)
    (place / "config.yaml").write_text(yaml.safe_dump(config()), encoding="utf-8")
    done = preview(place, monkeypatch, (f"data.train={name}", "data.eval_fraction=null", "eval.rows=null"))
    assert done.exit_code == 3
    assert part in complaint(done)
    assert name in complaint(done)
