"""The benchmark of the families: one run of it, and what it does about a family that fails, hangs or comes too late."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands in for the worker: the name of its checkpoint says what it does.
WORKER = """
import json, pathlib, sys, time
job = json.loads(sys.stdin.readline())
pathlib.Path(job["folder"]).mkdir()
if job["name"] == "tiny-mllama":
    sys.exit("out of memory")
if job["name"] == "tiny-pixtral":
    time.sleep(60)
row = dict(job, checkpoint_gb=1, write_s=1, load_s=1, step_s=1, tokens_per_batch=8, losses=[2, 1], generated=1)
print("RESULT " + json.dumps(dict(row, generate_s=1, train_peak_gib=3.25, fused="nothing", recorded_layers=0)))
"""


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.families.run")


def test_a_family_is_trained_and_answers(run, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--families", "tiny-mllama", "--page", "56", "56", "--tokens", "4", "--out", str(out)]
    assert run.main([*arguments, "--folder", str(tmp_path), "--commit", "abc"]) == 0
    (row,) = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert (row["name"], row["commit"], row["generated"]) == ("tiny-mllama", "abc", 4)
    assert len(row["losses"]) == len(row["steps_s"]) == 5
    assert row["losses"][-1] < row["losses"][0]  # the same pages five times
    assert "tiny-mllama: " in capsys.readouterr().out
    importlib.import_module("benchmarks.families.table").main([str(out)])
    *_, line, _, where = capsys.readouterr().out.splitlines()
    assert (
        line
        == f"| tiny-mllama | {row['tokens_per_batch']} | {row['load_s']:.1f} | – | {row['step_s']:.3f} | – | "
        + (f"{row['generate_s']:.2f} |")
    )
    assert where.endswith("commit abc")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]  # the checkpoint is gone


def test_what_fails_or_hangs_does_not_stop_the_others(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "WORKER", (sys.executable, "-c", WORKER))
    out = tmp_path / "rows.jsonl"
    families = ["tiny-mllama", "tiny-pixtral", "tiny-gemma3"]
    assert run.main(["--families", *families, "--limit", "3", "--folder", str(tmp_path), "--out", str(out)]) == 1
    first, *told = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny-mllama FAILED")
    assert first.endswith("out of memory")
    assert told[0].startswith("tiny-pixtral FAILED")
    assert "was not done after 3 s" in told[0]
    assert "train 3.25 GiB" in told[1]
    assert [json.loads(line)["name"] for line in out.read_text(encoding="utf-8").splitlines()] == ["tiny-gemma3"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_none_is_begun_after_the_budget(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "WORKER", (sys.executable, "-c", WORKER))
    assert run.main(["--families", "tiny-gemma3", "tiny-qwen2_vl", "--budget", "-1"]) == 1
    assert capsys.readouterr().out.startswith("tiny-gemma3, tiny-qwen2_vl: not begun")
