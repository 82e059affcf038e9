"""The decoding benchmark runs its stacks in processes of their own, compares their answers and writes rows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.decoding.run")


def test_stacks_answer_alike_and_leave_rows(run, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    arguments = ["tiny", str(tmp_path / "tiny"), "--workload", "toy", "--stack", "hf", "fvlm", "--tokens", "8"]
    assert run.main([*arguments, "--rows", "2", "--repeats", "1", "--out", str(out), "--commit", "abc"]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["stack"] for row in rows] == ["hf", "fvlm"]
    for row in rows:
        assert row["commit"] == "abc"
        assert row["rows"] == 2
        assert row["first_difference"] is None
        assert row["limit_tokens_s"] > 0
    assert rows[0]["read_bytes"] == rows[1]["read_bytes"]
    assert capsys.readouterr().out.count("tokens/s") == 2


def test_answers_that_part_fail_the_run_on_a_cpu(run, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    figures = {"tokens_s": 1.0, "read_bytes": 9, "rows": 1, "first_token_s": 1.0, "first_call_s": 1.0, "peak_gib": None}
    answers = iter([[[5, 6, 7]], [[5, 6, 8]]])
    monkeypatch.setattr(run, "measure", lambda stack, _: {**figures, "stack": stack, "answer": next(answers)})
    assert run.main(["tiny", str(tmp_path), "--stack", "hf", "fvlm"]) == 1


def test_where_answers_part(run):
    assert run.first_difference([[1, 2, 3]], [[1, 2, 3]]) is None
    assert run.first_difference([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == 1


def test_a_stack_that_fails_fails_the_run(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert run.main(["tiny", str(tmp_path), "--workload", "toy", "--stack", "fvlm", "--tokens", "8"]) == 1
    assert "fvlm failed: " in capsys.readouterr().err
