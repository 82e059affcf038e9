"""The benchmark of two processes starts them, holds them against one, and fails where they part."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return importlib.import_module("benchmarks.distributed.run")


def row(name, losses, *, waits=None, weights=(1.0, 1.0)):
    ranks = [{"peak_gib": 1.0, "waits": waits, "weights": weight} for weight in weights]
    return {"run": name, "world": 2, "step_s": 1.0, "losses": losses, "ranks": ranks}


def test_two_processes_follow_one(run, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["tiny", str(tmp_path / "tiny"), "--workload", "toy", "--steps", "3", "--warmup", "1"]
    assert run.main([*arguments, "--optim", "adamw_torch", "--out", str(out), "--commit", "abc"]) == 0
    rows = {row["run"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert set(rows) == {"one", "doubled", "several", "several_all_used"}
    assert rows["several"]["losses"] == pytest.approx(rows["doubled"]["losses"], rel=1e-5)
    assert rows["several"]["losses"] != pytest.approx(rows["one"]["losses"], rel=1e-5)
    assert len(rows["several"]["ranks"]) == 2
    assert "efficiency" in capsys.readouterr().out


def test_what_is_wrong_is_named(run):
    good = {name: row(name, [2.0, 1.0]) for name in ("one", "doubled", "several")}
    assert run.judge(good) == []
    assert run.judge({}) == [f"there is no row of {name!r}" for name in ("one", "doubled", "several")]
    far = {**good, "several": row("several", [2.0, 1.02])}
    assert run.judge(far) == ["several: losses are 2.00 % from one process's on the same batches"]
    assert run.judge({**good, "several": row("several", [2.0, 1.0], weights=(1.0, 1.1))}) == [
        "several: the processes' weights differ"
    ]
    waiting = {**good, "several": row("several", [2.0, 1.0], waits="called a synchronizing operation")}
    assert len(run.judge(waiting)) == 2
