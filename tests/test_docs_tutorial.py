"""`docs/tutorial.md`: its commands, run in order on real handwriting with the tiny model that fvlm-cli ships."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fvlm_cli.main import app
from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings

ROOT = Path(__file__).resolve().parent.parent
MODEL = "Qwen/Qwen2-VL-2B-Instruct"


def commands() -> list[list[str]]:
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().splitlines()]


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    for number, writing in enumerate(writings(30, 0, test=False)):
        writing.image.save(tmp_path / f"scans/{number:02}.png")
        (tmp_path / f"scans/{number:02}.txt").write_text(writing.text, encoding="utf-8")
    spoken = []
    for program, *words in commands():
        assert program == "fvlm"
        done = CliRunner().invoke(app, [word.replace(MODEL, str(shipped_checkpoint())) for word in words])
        assert done.exit_code == 0, (words, done.stderr, done.exception)
        spoken.append(done.stdout)
    verbs = [words[1] for words in commands()]
    assert verbs == ["init", "preview", "estimate", "train", "report", "infer", "infer", "eval", "merge", "infer"]
    for name in ("preview.html", "fvlm-run/report.html", "answers.jsonl", "fvlm-eval/metrics.json", "merged"):
        assert (tmp_path / name).exists(), name
    record = json.loads((tmp_path / "fvlm-run/run.json").read_text())
    assert record["answers_after"]["cer"] < record["answers_before"]["cer"]
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[0] == spoken[5].strip()
    assert len(spoken[-1].strip()) in range(1, 8)
