"""The training benchmark runs its stacks in processes of their own, holds their losses together and writes rows."""

from __future__ import annotations

import importlib
import json
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.training.run")


def test_stacks_agree_and_leave_rows(run, tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    arguments = ["tiny", str(tmp_path / "tiny"), "--workload", "toy", "--stack", "hf", "fvlm", "--steps", "3"]
    options = ["--warmup", "1", "--optim", "adamw_torch", "--decode", "8", "--out", str(out), "--commit", "abc"]
    assert run.main([*arguments, *options]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["stack"] for row in rows] == ["hf", "fvlm"]
    for row in rows:
        assert row["commit"] == "abc"
        assert row["step_s"] > 0
        assert len(row["losses"]) == 3
        assert len(set(row["losses"])) == 3
        assert row["tokens_s"] == pytest.approx(row["step_brings"]["tokens"] / row["step_s"])
        assert row["of_limit"] == pytest.approx(row["limit_s"] / row["step_s"])
        assert row["decode_tokens_s"] > 0
    assert rows[0]["step_brings"] == rows[1]["step_brings"]
    assert rows[0]["limit_s"] == rows[1]["limit_s"] > 0
    assert rows[0]["to_step_10_s"] is None
    told = capsys.readouterr().out
    for word in ("s a step", "tokens/s", "% of the arithmetic limit", "answers with", "% from the first"):
        assert told.count(word) >= 2, word


def test_a_stack_that_fails_fails_the_run(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert run.main(["tiny", str(tmp_path), "--workload", "toy", "--stack", "fvlm", "--steps", "1"]) == 1
    assert "fvlm failed on toy: " in capsys.readouterr().err


def test_losses_that_part_fail_the_run(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    brings = {"tokens": 9, "squares": 9, "learned": 2, "patches": 4, "spans": 16}
    figures = {"step_s": 1.0, "peak_gib": 2.0, "load_s": 1.0, "mode": "unsloth", "step_brings": brings, "tokens_s": 9.0}
    figures |= {"workload": "toy", "stack": "hf", "to_step_10_s": 41.25, "decode_tokens_s": None}
    monkeypatch.setattr(run, "operations", lambda folder, counts: 1e6 * counts.tokens)
    for last, status in ((1.02, 1), (1.009, 0)):
        curves = iter([[2.0, 1.0], [2.0, last]])
        monkeypatch.setattr(run, "measure", lambda *_, curves=curves: {**figures, "losses": next(curves)})
        assert run.main(["tiny", str(tmp_path), "--workload", "toy", "--stack", "hf", "fvlm", "--steps", "2"]) == status
    assert "step 10 ends after 41.2 s  losses 0.90 % from" in capsys.readouterr().out


def test_a_stack_that_cannot_answer_leaves_its_row_all_the_same(run, tmp_path, monkeypatch, capsys):
    printed = 'RESULT {"losses": [1.0], "decode_tokens_s": null}'
    done = subprocess.CompletedProcess([], 1, stdout=printed, stderr="ValueError: no answer")
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: done)
    options = Namespace(folder=tmp_path, optim="adamw_torch", steps=1, warmup=0, decode=8)
    assert run.measure("hf", "toy", "unsloth", options) == {"losses": [1.0], "decode_tokens_s": None}
    assert capsys.readouterr().err == "hf trained, and then could not answer: ValueError: no answer\n"


def test_stacks_that_are_not_installed_are_left_out(run, monkeypatch):
    from benchmarks.training import stacks

    monkeypatch.setattr(stacks, "find_spec", lambda name: None if name == "unsloth" else name)
    assert stacks.installed() == ["fvlm", "hf", "liger"]


@pytest.mark.parametrize(
    ("name", "workload", "row", "limit"),
    [("qwen2_vl-2b", "ocr", 518, 0.09), ("qwen2_vl-2b", "doc", 1947, 0.28), ("qwen2_5_vl-7b", "doc", 1947, 0.52)],
)
def test_rows_and_limits_are_the_yardsticks(run, tmp_path, name, workload, row, limit):
    """Tokens of a row, and the arithmetic limit in seconds at 790 TFLOP/s, as the peers were measured with."""
    from benchmarks.training.arithmetic import Counts, operations
    from benchmarks.training.sizes import real_config
    from benchmarks.training.stacks import _plain_collator
    from benchmarks.training.workloads import WORKLOADS, samples

    from fvlm_core.quantized import build_skeleton

    config, processor = real_config(name)
    config.save_pretrained(tmp_path)
    work = WORKLOADS[workload]
    collate, data = _plain_collator(build_skeleton(config), processor), samples(work, work.batch * work.accumulation)
    batches = [collate(data[i : i + work.batch]) for i in range(0, len(data), work.batch)]
    assert max(batch["input_ids"].shape[1] for batch in batches) < 2048  # FVLM and Unsloth would cut it
    step = Counts.of_step(batches, config, steps=1)
    assert step.tokens / len(data) == pytest.approx(row, rel=0.03)
    assert step.patches == len(data) * (1296 if workload == "ocr" else 5120)
    # Of `ocr` 0.091 s are matrix products, 0.011 attention, 0.002 the head and 0.002 the adapters.
    assert operations(str(tmp_path), step) / 790e12 == pytest.approx(limit, rel=0.2 if workload == "ocr" else 0.03)


def test_every_stack_is_told_the_same_modules(run, tmp_path):
    from benchmarks.training.targets import choose

    from fvlm_core.testing import tiny_checkpoint
    from fvlm_vision import FastVisionModel

    folder = str(tiny_checkpoint("mllama", tmp_path / "mllama"))
    model, _ = FastVisionModel.from_pretrained(folder, load_in_16bit=True)
    model = FastVisionModel.get_peft_model(model)
    choice = choose(folder)
    assert sorted(choice.targets) == sorted(model.base_model.targeted_module_names)
    assert choice.unquantized == ["model.multi_modal_projector", "lm_head"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2_vl-2b", 2.209),
        ("qwen2_5_vl-7b", 8.292),
        ("qwen3_vl-4b", 4.438),
        ("mllama-11b", 10.670),
        ("pixtral-12b", 12.683),
        ("mistral3-24b-20of40layers", 12.896),
        ("gemma3-4b", 4.300),
        ("smolvlm2-2b", 2.247),
        ("idefics3-8b", 8.462),
        ("internvl3-2b", 2.089),
        ("llava_onevision-7b", 8.031),
        ("paligemma-3b", 2.923),
    ],
)
def test_the_checkpoints_are_of_the_published_sizes(run, name, billions):
    import torch
    from benchmarks.training.sizes import real_config
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(real_config(name)[0])
    assert model.num_parameters() == pytest.approx(billions * 1e9, rel=1e-3)


def test_every_published_size_is_held_to_its_number_of_parameters(run):
    from benchmarks.training.published import PUBLISHED

    (marks,) = test_the_checkpoints_are_of_the_published_sizes.pytestmark
    assert [name for name, _ in marks.args[1]] == list(PUBLISHED)


def test_what_a_step_waits_for_data_is_told(run, tmp_path, capsys, monkeypatch):
    import time

    from benchmarks.training import waiting

    from fvlm_vision import FastVisionDataCollator

    call = FastVisionDataCollator.__call__

    def slow(self, samples):
        time.sleep(0.1)
        return call(self, samples)

    monkeypatch.setattr(FastVisionDataCollator, "__call__", slow)
    out = tmp_path / "rows.jsonl"
    arguments = ["tiny", str(tmp_path / "tiny"), "--workload", "toy", "--workers", "0", "--steps", "3", "--warmup", "1"]
    assert waiting.main([*arguments, "--optim", "adamw_torch", "--out", str(out)]) == 0
    ready, live = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert ready["losses"] == live["losses"]
    assert ready["wait_s"] < 0.05
    assert live["wait_s"] > 0.2  # two batches a step
    assert live["step_s"] > live["wait_s"]
    assert live["loader_images_s"] < 20
    assert "0 workers" in capsys.readouterr().out


def test_a_profile_says_what_the_device_does_and_waits_for(run, tmp_path, capsys):
    from benchmarks.training import profile

    def event(cat, name, start, long):
        return {"cat": cat, "name": name, "ts": start, "dur": long}

    events = [
        event("kernel", "cutlass_gemm", 1000, 400),
        event("gpu_memcpy", "Memcpy DtoH", 1300, 50),  # beside it
        event("kernel", "flash_fwd", 1900, 600),
        event("kernel", "norm", 2600, 100),
        event("cuda_runtime", "cudaStreamSynchronize", 1390, 300),
        event("cpu_op", "aten::item", 1380, 330),
        event("cpu_op", "aten::mul", 100, 20),
        {"cat": "kernel_other", "name": "x", "ts": 5, "ph": "i"},
    ]
    assert profile.gaps(events) == [
        (500, "cutlass_gemm", "flash_fwd", "aten::item 310, cudaStreamSynchronize 290"),
        (100, "flash_fwd", "norm", ""),
    ]
    told = profile.report(events, 2, 5)
    assert "a step: 0.8 ms, idle 0.3 ms" in told
    kinds = ["0.30 ms attention", "0.20 ms matrix products", "0.05 ms the rest", "0.03 ms copies"]
    assert [line.strip() for line in told.splitlines()[1:5]] == kinds
    arguments = [str(tmp_path / "tiny"), "--workload", "toy", "--optim", "adamw_torch", "--warmup", "2", "--steps", "1"]
    profile.main(["tiny", *arguments, "--trace", str(tmp_path / "trace.json")])
    assert "tiny toy unsloth\nnothing ran on a device" in capsys.readouterr().out
    assert any(
        event.get("name") == "aten::embedding"
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    )
