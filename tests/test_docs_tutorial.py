"""`docs/tutorial.md`: its commands, run in order on real handwriting with the tiny model that fvlm-cli ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from docs_tools import ROOT, blocks, run_commands, scans


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_of_the_docs: Path) -> None:
    monkeypatch.chdir(tmp_path)
    scans(tmp_path / "scans")
    texts = [block.text for block in blocks(ROOT / "docs/tutorial.md") if block.runs]
    spoken = [said for text in texts for said in run_commands(text, model_of_the_docs)]
    verbs = [line.split()[1] for text in texts for line in text.splitlines()]
    assert verbs == ["init", "preview", "estimate", "train", "report", "infer", "infer", "eval", "merge", "infer"]
    for name in ("preview.html", "fvlm-run/report.html", "answers.jsonl", "fvlm-eval/metrics.json", "merged"):
        assert (tmp_path / name).exists(), name
    record = json.loads((tmp_path / "fvlm-run/run.json").read_text())
    assert record["answers_after"]["cer"] < record["answers_before"]["cer"]
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[0] == spoken[5].strip()
    assert len(spoken[-1].strip()) in range(1, 8)
