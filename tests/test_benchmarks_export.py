"""The export benchmark copies, merges in a process of its own, writes rows, and holds a merge to a memory limit."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.export.run")


def test_copy_and_merge_leave_rows_and_nothing_else(run, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    asked = ["--gb", "0", "--no-verify-too", "--replace", "--out", str(out), "--commit", "abc"]
    assert run.main([str(tmp_path / "work"), *asked]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["verify"] for row in rows] == [True, False]
    size = sum(path.stat().st_size for path in (tmp_path / "work" / "base").glob("*.safetensors"))
    for row in rows:
        assert row["commit"] == "abc"
        assert row["replaced"]
        assert row["gb"] == pytest.approx(size / 1e9)
        assert row["mb_s"] == pytest.approx(size / 1e6 / row["merge_s"])
        assert row["merged"] > 10
        assert 0 < row["cp_s"] <= row["cp_sync_s"]
        assert 0.1 < row["peak_anonymous_gb"] < 20
    assert rows[0]["largest_error"] < 0.01
    assert rows[1]["largest_error"] is None
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["adapter", "base"]
    assert capsys.readouterr().out.count("x cp") == 4


def test_a_merge_over_its_limit_fails_the_run(run, tmp_path, capsys):
    memory = Path("/sys/fs/cgroup/memory")
    if not os.access(memory if memory.is_dir() else memory.parent, os.W_OK):
        pytest.skip("making a memory cgroup takes rights that this user lacks")
    assert run.main([str(tmp_path / "work"), "--gb", "0", "--limit", "0.1"]) == 1
    assert "the merge ended with -9" in capsys.readouterr().err


def test_the_checkpoint_is_as_large_as_asked(run):
    from benchmarks.export.checkpoint import cut_config

    assert cut_config(16.6).text_config.num_hidden_layers == 28
    assert cut_config(12).text_config.num_hidden_layers == 18
