"""The kernels' benchmark runs, writes whole rows, and refuses to time an op that is wrong."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.kernels.run")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_op_gives_a_row_for_each_pass_and_provider(run, tmp_path):
    out = tmp_path / "new" / "kernels.jsonl"
    assert run.main(["--tiny", "--repeats", "2", "--skip", "compile", "--commit", "abc", "--out", str(out)]) == 0
    rows = rows_of(out)
    cases = [case for build in run.OPS.values() for case in build(True)]
    for case in cases:
        found = {(r["pass"], r["provider"]) for r in rows if (r["op"], r["case"]) == (case.op, case.name)}
        second = "both" if case.op in ("cross_entropy", "linear_cross_entropy") else "backward"
        passes = ("forward", second) if case.wanted else ("forward",)
        assert {(p, provider) for p in passes for provider in ("torch", "fvlm")} <= found
        assert {p for p, _ in found} == set(passes)
    for row in rows:
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["commit"] == "abc"
        assert row["torch"]
        assert row["of_ceiling"] >= 0


def test_rate_is_what_moved_over_the_median(run):
    from benchmarks.kernels.measure import Timing

    case = next(iter(run.OPS["rms_norm"](False)))
    row = run.row_of(case, "forward", "fvlm", Timing(1e-6, 2e-6, 3e-6, 0, 0), {"bytes": 1e13})
    moved = 2 * 1036 * 1536 * 2  # read once, written once, two bytes each
    assert row["GB/s"] == pytest.approx(moved / 2e-6 / 1e9, abs=0.1)
    assert row["of_ceiling"] == pytest.approx(moved / 2e-6 / 1e13, abs=1e-3)


def test_rate_of_both_passes_is_that_of_all_their_work(run):
    from benchmarks.kernels.measure import Timing

    case = next(case for case in run.OPS["linear_cross_entropy"](False) if "a third" in case.name)
    row = run.row_of(case, "both", "fvlm", Timing(1e-3, 2e-3, 3e-3, 0, 0), {"flops": 1e15})
    worked = 2 * (2 * 683 * 1536 * 151936)  # logits, and their gradient times a frozen head
    assert row["TFLOP/s"] == pytest.approx(worked / 2e-3 / 1e12, abs=0.1)


def test_a_wrong_op_is_refused(run, tmp_path, monkeypatch):
    case = run.OPS["gelu"](True)[0]
    wrong = replace(case, providers=case.providers | {"fvlm": lambda x: case.reference(x) * 1.01})
    monkeypatch.setitem(run.OPS, "gelu", lambda tiny: [wrong])
    out = tmp_path / "kernels.jsonl"
    assert run.main(["--tiny", "--repeats", "2", "--skip", "compile", "--out", str(out), "gelu"]) == 1
    (row,) = rows_of(out)
    assert "exceeds" in row["refused"]


def test_rows_are_appended(run, tmp_path):
    out = tmp_path / "kernels.jsonl"
    arguments = ["--tiny", "--repeats", "2", "--skip", "compile", "--out", str(out), "vision_rotary"]
    run.main(arguments)
    first = rows_of(out)
    run.main(arguments)
    assert rows_of(out)[: len(first)] == first
    assert len(rows_of(out)) == 2 * len(first)


@pytest.mark.parametrize("arguments", [["--tiny", "softmax"], ["--tiny", "--repeats", "1"]])
def test_bad_arguments_are_usage_errors(run, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main([*arguments, "--out", str(tmp_path / "x.jsonl")])
    assert caught.value.code == 2
    assert arguments[-1] in capsys.readouterr().err
