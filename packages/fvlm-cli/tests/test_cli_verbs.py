"""What every verb has in common: exit codes, one JSON object, one sentence without and a traceback with --debug."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fvlm_cli.exits import Exit
from fvlm_cli.main import app
from fvlm_cli.quickstart.folders import shipped_checkpoint

BAD = [
    (("train", "nowhere.yaml"), Exit.USAGE, "nowhere.yaml"),
    (("train", "config.yaml", "lora.rr=1"), Exit.USAGE, "did you mean lora.r?"),
    (("init", "config.yaml"), Exit.USAGE, "config.yaml exists already"),
    (("init", "new.yaml", "--model", "./nowhere"), Exit.DATA, "nowhere"),
    (("preview", "config.yaml", "--lora.rr", "1"), Exit.USAGE, "did you mean lora.r?"),
    (("preview", "config.yaml", "data.train=nowhere.jsonl"), Exit.DATA, "nowhere.jsonl"),
    (("preview", "config.yaml", "model.name=./nowhere"), Exit.DATA, "nowhere"),
    (("estimate", "config.yaml", "--gpu", "h300"), Exit.USAGE, "did you mean h200?"),
    (("estimate", "config.yaml", "model.name=./nowhere"), Exit.DATA, "nowhere"),
    (("infer", "./nowhere", "--prompt", "x"), Exit.DATA, "nowhere"),
    (("infer", "./nowhere"), Exit.USAGE, "give --prompt"),
    (("chat", "./nowhere"), Exit.DATA, "nowhere"),
    (("eval", "./nowhere", "config.yaml"), Exit.USAGE, "nothing to evaluate on"),
    (("eval", "./nowhere", "config.yaml", "data.eval=train.jsonl"), Exit.DATA, "nowhere"),
    (("eval", "./nowhere", "config.yaml", "data.eval=train.jsonl", "-o", "full"), Exit.USAGE, "new or empty"),
    (
        ("eval", "./nowhere", "config.yaml", "data.eval=train.jsonl", "-o", "config.yaml/x"),
        Exit.USAGE,
        "which is a file",
    ),
    (("infer", "./nowhere", "--prompt", "x", "-o", "config.yaml/x"), Exit.USAGE, "which is a file"),
    (("init", "config.yaml/x"), Exit.USAGE, "which is a file"),
    (("init", "full"), Exit.USAGE, "CONFIG.yaml 'full' is a folder"),
    (("preview", "config.yaml", "--html", "full"), Exit.USAGE, "--html 'full' is a folder"),
    (("report", "nowhere", "--output", "full"), Exit.USAGE, "--output 'full' is a folder"),
    (("chat", str(shipped_checkpoint()), "--image", "nowhere.png"), Exit.DATA, "nowhere.png"),
    (("report", "nowhere"), Exit.DATA, "run.json"),
    (("merge", "./nowhere", "-o", "merged"), Exit.DATA, "nowhere"),
    (("merge", "./nowhere", "-o", "full"), Exit.USAGE, "--output full is not empty"),
    (("merge", "./nowhere", "-o", "config.yaml/x"), Exit.USAGE, "which is a file"),
    (("push", "./nowhere", "user/name"), Exit.DATA, "nowhere"),
    (("env", "--model", "./nowhere"), Exit.DATA, "nowhere"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(
        f"model: {{name: {shipped_checkpoint()}}}\ndata: {{train: train.jsonl}}\n", encoding="utf-8"
    )
    row = json.dumps({"prompt": "q", "completion": "a"})
    (tmp_path / "train.jsonl").write_text("\n".join([row] * 4), encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep me", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "part"), BAD, ids=lambda value: " ".join(value) if type(value) is tuple else ""
)
def test_bad_input(here: Path, words: tuple[str, ...], code: Exit, part: str) -> None:
    before = sorted(path.name for path in here.iterdir())
    done = CliRunner().invoke(app, [*words, "--quiet", "--json"])
    assert done.exit_code == code, done.stderr
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == code
    assert part in answer["error"]
    assert done.stderr.strip() == f"fvlm: {answer['error']}"
    assert sorted(path.name for path in here.iterdir()) == before
    loud = CliRunner().invoke(app, [*words, "--debug"])
    assert loud.exit_code == code
    assert "Traceback" in loud.stderr
    assert loud.stdout == ""


def test_every_verb_is_tried_and_has_the_common_options() -> None:
    from typer.main import get_command

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    assert {words[0] for words, _, _ in BAD} | {"quickstart", "version"} == set(verbs)
    for name, command in verbs.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--quiet", "-q", "--debug"} <= options, name
        assert command.help, name
        for parameter in command.params:
            if parameter.name != "help":
                assert parameter.help, f"{name} {parameter.name}"  # type: ignore[attr-defined]
