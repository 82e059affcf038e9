"""Runs, models and adapters that were torn or edited: no traceback, one sentence that names the file, its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fvlm_cli.main import app
from fvlm_cli.quickstart.folders import shipped_checkpoint

JUNK: dict[str, bytes | None] = {
    "torn": b'{"a":',
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "numbers": b"[1]",
    "an object": b"{}",
    "null": b"null",
    "text": b'"abc"',
}
WEIRD = st.sampled_from([None, True, -3, 10**30, float("nan"), 1e400, "", "abc", [], [1], {}, {"a": 1}])


def ask(*words: str, stdin: str | None = None) -> Any:
    done = CliRunner().invoke(app, [*words, "--json", "--quiet"], input=stdin)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert "Traceback" not in done.stderr
    return done


def refused(done: Any, *parts: str, code: int = 3) -> str:
    """Check that a verb said in one sentence what is wrong; return it."""
    assert done.exit_code == code, (done.exit_code, done.stderr)
    found = json.loads(done.stdout)
    assert found["exit_code"] == code
    assert done.stderr == f"fvlm: {found['error']}\n"
    assert len(found["error"]) < 1000
    for part in parts:
        assert part in found["error"]
    return str(found["error"])


@pytest.fixture(scope="module")
def run(handwriting_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without its weights."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(handwriting_run / "run", folder, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    return folder


FILES = ["run.json", "history.json", "config.yaml", "eval/before.jsonl", "eval/after.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_a_run_with_a_damaged_file(run: Path, tmp_path: Path, name: str) -> None:
    page = tmp_path / "page.html"
    kept = (run / name).read_bytes()
    harmless = {("run.json", "an object"), ("history.json", "a list"), ("config.yaml", "an object")}
    try:
        for what, junk in JUNK.items():
            (run / name).write_bytes(junk or b"")
            for words in (("report", str(run)), ("report", str(tmp_path / "good"), "--compare", str(run))):
                if not (tmp_path / "good").exists():
                    shutil.copytree(run, tmp_path / "good")
                    (tmp_path / "good" / name).write_bytes(kept)
                done = ask(*words, "--output", str(page))
                if (name, what) in harmless or (what == "empty" and name.startswith("eval/")):
                    assert done.exit_code == 0, (what, done.stderr)
                    page.unlink()
                else:
                    refused(done, str(run / name), "damaged")
                    assert not page.exists()
    finally:
        (run / name).write_bytes(kept)


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(["run.json", "history.json", "eval/after.jsonl"]), value=WEIRD)
def test_a_run_with_one_wrong_value(run: Path, data: st.DataObject, name: str, value: Any) -> None:
    kept = (run / name).read_text(encoding="utf-8")
    lines = name.endswith(".jsonl")
    content: Any = [json.loads(line) for line in kept.splitlines()] if lines else json.loads(kept)
    holder = data.draw(st.sampled_from(content)) if isinstance(content, list) else content
    holder[data.draw(st.sampled_from(sorted(holder)))] = value
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    try:
        (run / name).write_text(text, encoding="utf-8")
        done = ask("report", str(run), "--output", str(run / "page.html"))
    finally:
        (run / name).write_text(kept, encoding="utf-8")
    if done.exit_code:
        if "images" in done.stderr or "is missing" in done.stderr:
            assert done.exit_code == 3
        else:
            refused(done, str(run / name), "damaged")


def test_a_report_whose_pictures_are_gone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    picture = next((tmp_path / "run/eval/images").iterdir())
    picture.unlink()
    refused(ask("report", str(tmp_path / "run")), picture.name, "evaluate again")
    picture.mkdir()
    refused(ask("report", str(tmp_path / "run")), picture.name, "directory")


MODEL = {"torn": JUNK["torn"], "list": JUNK["a list"], "not UTF-8": JUNK["not UTF-8"]}


@pytest.mark.parametrize("what", MODEL)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "generation_config.json"]
)
def test_a_model_with_a_damaged_file(tmp_path: Path, name: str, what: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(shipped_checkpoint(), model)
    (model / name).write_bytes(MODEL[what] or b"")
    refused(ask("infer", str(model), "--prompt", "hi"), str(model))
    if name == "config.json":
        refused(ask("env", "--model", str(model)), str(model))


def test_a_chat_template_that_leaves_the_image_out(tmp_path: Path) -> None:
    from PIL import Image

    model = tmp_path / "model"
    shutil.copytree(shipped_checkpoint(), model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}hello{% endfor %}", encoding="utf-8")
    Image.new("RGB", (56, 28)).save(tmp_path / "a.png")
    refused(
        ask("infer", str(model), "--prompt", "hi", "--image", str(tmp_path / "a.png")),
        "refuses it",  # the model; from transformers 5.24 on the processor already
        "tokens",
    )


def _set(**values: Any) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")

    return edit


ADAPTERS = {
    "no base": _set(base_model_name_or_path=None),
    "a number as base": _set(base_model_name_or_path=3),
    "a base that is gone": _set(base_model_name_or_path="./gone"),
    "rank as text": _set(r="x"),
    "an unknown kind": _set(peft_type="NOPE"),
    "torn weights": lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"xx"),
    "no weights": lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
    "torn config": lambda adapter: (adapter / "adapter_config.json").write_bytes(b"{"),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_that_is_damaged(handwriting_run: Path, tmp_path: Path, what: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(handwriting_run / "run/adapter", adapter)
    ADAPTERS[what](adapter)
    refused(ask("infer", str(adapter), "--prompt", "hi"))
    if what == "rank as text":
        refused(ask("estimate", str(handwriting_run / "config.yaml"), f"model.name={adapter}"))
    # To merge, a base can be given: that it lacks one is a matter of the command line.
    code = 2 if what in ("no base", "a number as base") else 3
    refused(ask("merge", str(adapter), "--output", str(tmp_path / "merged")), code=code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("merge", "ADAPTER", "--output", "merged", "--adapter", "other=inf"), "NAME=NUMBER"),
        (("merge", "ADAPTER", "--output", "merged", "--metric", "cer=nan"), "NAME=NUMBER"),
        (("merge", "ADAPTER", "--output", ".", "--overwrite"), "current folder"),
        (("merge", "ADAPTER", "--output", "ADAPTER", "--overwrite"), "which is read"),
        (("estimate", "config.yaml", "--image", "99999999999999999999x1"), "pixels that training takes"),
        (("estimate", "config.yaml", "--image", "9x9", "--images", "100000"), "from 0 to 1000"),
        (("estimate", "config.yaml", f"train.per_device_train_batch_size={10**20}"), "per_device_train_batch_size"),
        (("estimate", "config.yaml", f"lora.r={10**20}"), "lora.r"),
        (("train", "config.yaml", f"train.seed={10**10}"), "train.seed"),
        (("infer", "ADAPTER", "--prompt", "x", "--temperature", "1e-300"), "temperature of 1e-300"),
        (("infer", "ADAPTER", "--prompt", "x", "--temperature", "nan"), "nan"),  # by Typer, or by us where it takes it
        (("infer", "ADAPTER", "--prompt", "x", "--seed", str(10**30)), "--seed"),
        (("infer", "ADAPTER", "--prompt", "x", "--max-new-tokens", str(10**30)), "from 1 to 1000000"),
    ],
)
def test_options_that_would_do_harm(
    handwriting_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], part: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(handwriting_run / "run/adapter", adapter)
    shutil.copy(handwriting_run / "config.yaml", tmp_path)
    shutil.copy(handwriting_run / "train.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(ask(*(str(adapter) if word == "ADAPTER" else word for word in words)), part, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "config.yaml", "train.jsonl"]


def test_long_names_are_cut_and_odd_bytes_named(handwriting_run: Path, tmp_path: Path) -> None:
    assert "…" in refused(ask("env", "--model", "x" * 5000))
    adapter = str(handwriting_run / "run/adapter")
    words = ("merge", adapter, "--output", str(tmp_path / "merged"), "--data", "caf\udce9")
    refused(ask(*words), "'\\udce9'", "not UTF-8")
    assert list(tmp_path.iterdir()) == []
