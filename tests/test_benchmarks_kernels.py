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
        second = "both" if case.op.startswith(("cross", "linear_cross", "lora")) else "backward"
        passes = ("forward", second) if case.wanted else ("forward",)
        assert {(p, provider) for p in passes for provider in ("torch", "fvlm")} <= found
        assert {p for p, _ in found} == set(passes)
    for row in rows:
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["commit"] == "abc"
        assert row["torch"]
        assert row["of_ceiling"] >= 0


def test_rate_is_what_moved_over_the_recorded_time(run):
    from benchmarks.kernels.measure import Timing

    case = next(iter(run.OPS["rms_norm"](False)))
    row = run.row_of(case, "forward", "fvlm", Timing(1e-6, 3e-6, 4e-6, 0, 0, 2e-6, 0), {"bytes": 1e13}, 2e13)
    moved = 2 * 1036 * 1536 * 2  # read once, written once, two bytes each
    assert row["GB/s"] == pytest.approx(moved / 2e-6 / 1e9, abs=0.1)
    assert row["of_ceiling"] == pytest.approx(moved / 2e-6 / 1e13, abs=1e-3)
    assert row["of_copy"] == pytest.approx(moved / 2e-6 / 2e13, abs=1e-3)


def test_rate_of_both_passes_is_that_of_all_their_work(run):
    from benchmarks.kernels.measure import Timing

    case = next(case for case in run.OPS["linear_cross_entropy"](False) if "a third" in case.name)
    row = run.row_of(case, "both", "fvlm", Timing(1e-3, 2e-3, 3e-3, 0, 0, None, 0), {"flops": 1e15}, 0.0)
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


def row(op, provider, mode="both", device=None, eager=100.0, of_ceiling=0.5, **shape):
    times = {"p50_us": 120.0, "device_us": device, "eager_us": eager, "of_ceiling": of_ceiling}
    return {"op": op, "case": "c", "pass": mode, "provider": provider, "shape": shape} | times


def found(rows):
    from benchmarks.kernels.reach import verdicts

    return {v.what: (v.value, v.needed, v.reached) for v in verdicts(rows)}


def test_lora_is_held_to_peft_by_rows(run):
    few = [row("lora_mlp", "peft", device=30.0, rows=512), row("lora_mlp", "fvlm", device=10.0, eager=80.0, rows=512)]
    assert found(few) == {"x peft, device": (3.0, 1.5, True), "x peft, eager": (1.25, 1.5, False)}
    many = [r | {"shape": {"rows": 8192}} for r in few]
    assert found(many) == {"x peft, device": (3.0, 1.2, True), "x peft, eager": (1.25, 1.2, True)}
    assert found([r | {"pass": "forward"} for r in few]) == {}


def test_elementwise_ops_are_held_to_the_copy_from_4096_rows(run):
    ours = row("gelu", "fvlm", "forward", device=10.0, of_ceiling=0.84, rows=4096)
    plain = row("gelu", "torch", "forward", device=9.0, of_ceiling=0.9, rows=4096)
    held = found([ours, plain])
    assert held["of ceiling"] == (0.84, 0.85, False)
    assert held["x torch, device"] == (0.9, 1.0, False)
    assert "of ceiling" not in found([r | {"shape": {"rows": 4095}} for r in (ours, plain)])


def test_heads_are_held_to_liger_where_two_thirds_are_ignored(run):
    def rows(kept):
        shape = {"rows": 2048, "kept": kept}
        return [row("linear_cross_entropy", p, of_ceiling=0.7, **shape) for p in ("liger", "fvlm")]

    assert found(rows(683)) == {
        "of ceiling": (0.7, 0.7, True), "x liger, device": (1.0, 1.5, False), "x liger, eager": (1.0, 1.5, False),
    }  # fmt: skip
    assert found(rows(2048)) == {"of ceiling": (0.7, 0.7, True)}


def test_the_last_row_counts_and_the_table_names_what_is_missed(run, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [
        row("nf4", "fvlm", "forward", of_ceiling=0.9, out=8),
        row("nf4", "fvlm", "forward", of_ceiling=0.4, out=8),
        {"op": "gelu", "case": "d", "pass": "forward", "provider": "liger", "failed": "RuntimeError: no"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert run.main(["--check", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "0.400 of 0.80, 50% short" in shown
    assert "FAILED  gelu d forward: liger, RuntimeError: no" in shown
    assert "0 of 1 reached" in shown
    path.write_text(json.dumps(rows[0]) + "\n")
    assert run.main(["--check", str(path)]) == 0


def test_a_peer_that_cannot_run_is_named_and_ours_must(run, tmp_path, monkeypatch):
    def broken(x):
        raise RuntimeError("no such thing")

    case = run.OPS["gelu"](True)[0]
    monkeypatch.setitem(run.OPS, "gelu", lambda tiny: [replace(case, providers=case.providers | {"compile": broken})])
    out = tmp_path / "kernels.jsonl"
    assert run.main(["--tiny", "--repeats", "2", "--out", str(out), "gelu"]) == 0
    failed = [r for r in rows_of(out) if r["provider"] == "compile"]
    assert [(r["pass"], r["failed"]) for r in failed] == [
        ("forward", "RuntimeError: no such thing"), ("backward", "RuntimeError: no such thing"),
    ]  # fmt: skip


def test_no_case_is_begun_after_the_time_is_up(run, tmp_path, capsys):
    out = tmp_path / "kernels.jsonl"
    assert run.main(["--tiny", "--minutes", "0", "--out", str(out), "vision_rotary"]) == 0
    assert rows_of(out) == []
    assert capsys.readouterr().out.count("left out") == 2


def test_compiling_ahead_calls_every_pass_of_what_compiles(run):
    import torch
    from benchmarks.kernels.warm import compile_case

    called = []

    def spy(x):
        called.append(x.requires_grad)
        return x * 2

    case = run.OPS["gelu"](True)[0]
    compile_case(replace(case, providers={"torch": None, "compile": spy, "fvlm": spy}), torch.device("cpu"))
    assert called == [False, True, False, True]


def test_what_is_kept_is_made_once_for_each_tensor(run):
    import torch
    from benchmarks.kernels.case import Kept

    kept, made = Kept(), []
    first, second = torch.zeros(1), torch.zeros(1)

    def make():
        made.append(len(made))
        return made[-1]

    assert [kept(t, make) for t in (first, second, first, second)] == [0, 1, 0, 1]


def test_the_table_compares_by_both_clocks(run):
    from benchmarks.kernels.table import table

    rows = [
        row("gelu", "torch", "forward", device=30.0, eager=50.0, rows=8),
        row("gelu", "fvlm", "forward", device=10.0, eager=100.0, of_ceiling=0.9, rows=8) | {"of_copy": 0.95},
        row("nf4", "fvlm", "forward", device=10.0, out=8),
        row("gelu", "liger", "backward", rows=8),
        row("gelu", "fvlm", "backward", rows=8),
    ]
    head, _, forward, backward = table(rows, ["gelu"])
    assert head.endswith("| × torch, device / eager | × liger, device / eager |")
    assert forward == "| `gelu` c | forward | 10.0 | 90% (95%) | 3.00 / 0.50 | – |"
    assert backward == "| `gelu` c | backward | 120.0 | 50% | – | 1.00 / 1.00 |"


def test_what_tiny_runs_measure_is_no_result(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "kernels.jsonl")
    assert run.main(["--tiny", "--repeats", "2", "--skip", "compile", "vision_rotary"]) == 0
    assert not run.RESULTS.exists()
    committed = rows_of(ROOT / "benchmarks" / "results" / "kernels.jsonl")
    assert {"NVIDIA"} == {row["card"].split()[0] for row in committed}
