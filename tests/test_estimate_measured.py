"""`fvlm estimate` against training steps that were measured on a GPU (`benchmarks/results/train_step.jsonl`)."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fvlm_cli.config.read import read_config
from fvlm_cli.estimate.gpus import GPUS, Gpu
from fvlm_cli.estimate.plan import Estimate, estimate, loads_of
from fvlm_cli.estimate.workload import Load
from fvlm_cli.inspection.opened import open_model

ROOT = Path(__file__).resolve().parents[1]
MEMORY, TIME = 0.10, 0.30
"""How far the estimate may be from the measured peak, and from the measured time."""
PADDED = {
    ("ocr", 518): (518, 514, 521, 529, 528, 536, 511, 527, 526, 516, 523, 528, 521, 518, 518, 539),
    ("ocr", 499): (499, 506, 495, 500, 522, 501, 512, 506, 500, 493, 498, 496, 505, 511, 505, 496),
    ("ocr", 398): (398, 403, 423, 405, 439, 402, 420, 428, 415, 418, 388, 399, 431, 420, 419, 402),
    ("doc", 1947): (1947, 1927, 1950, 1915),
    ("doc", 1930): (1930, 1907, 1912, 1920),
    ("doc", 2048): (2048, 2048, 2048, 2048),
}
"""Workload, and the length of its first batch in a row → what its batches were padded to, where the checkpoint's
tokenizer cut the words otherwise than `benchmarks.training.sizes` does: found with that tokenizer and these words."""


WARM_UP = {"tokens_per_row": 5, "to_step_10_s": 6}
"""Key that the rows of a script have → the steps after which it started to measure."""


def measured() -> list[dict[str, Any]]:
    """The rows of FVLM, under the names that the benchmark gives them now: the newest one of each of its kind.

    Rows whose steps were measured while layers were still recorded are left out, as an estimate of a step does.
    """
    lines = (ROOT / "benchmarks/results/train_step.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    now = {"variant": "stack", "work": "workload", "use_gradient_checkpointing": "mode"}
    rows = [{now.get(key, key): value for key, value in row.items()} for row in rows]
    ours = [row for row in rows if row["stack"] == "fvlm" and row["peak_gib"] is not None]
    ours = [row for row in ours if "while" not in row]
    kinds = ("model", "workload", "mode", "card", "optim")
    return list({tuple(row[key] for key in kinds): row for row in ours}.values())  # rows are appended


def card(name: str) -> Gpu:
    return next(gpu for gpu in GPUS.values() if gpu.name in name.lower().split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function: name of a size → a folder with its config and processor, and no weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        sizes = importlib.import_module("benchmarks.training.sizes")

        @cache
        def make(name: str) -> Path:
            path: Path = tmp_path_factory.mktemp(name)
            config, processor = sizes.real_config(name)
            config.save_pretrained(path)
            processor.save_pretrained(path)
            return path

        yield make


def estimated(row: dict[str, Any], folder: Path) -> Estimate:
    workloads = importlib.import_module("benchmarks.training.workloads")
    work = workloads.WORKLOADS[row["workload"]]
    text = f"""
model: {{name: {folder}, precision: 4bit, gradient_checkpointing: {row["mode"]}, max_seq_length: 2048}}
lora: {{r: 16, alpha: 32}}
data: {{train: made.jsonl}}
train:
  per_device_train_batch_size: {work.batch}
  gradient_accumulation_steps: {work.accumulation}
  optim: {row["optim"]}
"""
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    config = read_config(folder / "run.yaml")
    opened = open_model(str(folder))
    vars(opened.skeleton)["max_seq_length"] = 2048  # as both scripts leave it
    from fvlm_cli.data.row import Row

    count = 4 * work.batch * work.accumulation  # as many as the benchmark has
    rows = [Row(sample, f"sample {n}") for n, sample in enumerate(workloads.samples(work, count))]
    loads = loads_of(config, opened, rows)
    lengths = row.get("lengths") or PADDED.get((row["workload"], first_length(row, work)))
    if lengths is not None:
        loads = [_as_long(loads[0], length) for length in lengths for _ in range(work.batch)]
    return estimate(config, opened, loads)


def first_length(row: dict[str, Any], work: Any) -> int:
    """Return what the first batch of a row was padded to; without its lengths, ``tokens_s`` is of the first batch."""
    if "lengths" in row:
        return int(row["lengths"][0])
    if "tokens_per_row" in row:
        return int(row["tokens_per_row"])
    return round(row["tokens_s"] * row["step_s"] / (work.batch * work.accumulation))


def _as_long(load: Load, tokens: int) -> Load:
    return dataclasses.replace(load, tokens=tokens, learned=load.learned + tokens - load.tokens)


def steps_of(found: Estimate) -> list[list[int]]:
    """Return the length of each batch of each step in the data."""
    rows, train = found.loads, found.config.train
    lengths = [max(row.tokens for row in rows[i : i + found.batch]) for i in range(0, len(rows), found.batch)]
    each = train.gradient_accumulation_steps
    return [lengths[i : i + each] for i in range(0, len(lengths), each)]


def still_records(found: Estimate, after: int) -> bool:
    """Whether texts of new lengths are recorded when so many steps are done, in the order that the data come in."""
    steps = steps_of(found)
    done = [length for number in range(after) for length in steps[number % len(steps)]]
    come = Counter(-(-length // 64) * 64 for length in done)
    return any(come[-(-length // 64) * 64] < 2 for step in steps for length in step)


def named(row: dict[str, Any]) -> str:
    return f"{row['model']}-{row['workload']}-{row['mode']}"


@pytest.mark.parametrize("row", [pytest.param(row, id=named(row)) for row in measured()])
def test_the_estimate_is_near_what_was_measured(row: dict[str, Any], folder: Any) -> None:
    found = estimated(row, folder(row["model"]))
    work = importlib.import_module("benchmarks.training.workloads").WORKLOADS[row["workload"]]
    assert max(load.tokens for load in found.loads[: found.batch]) == first_length(row, work)
    if "patches_per_batch" in row:
        assert found.batch * found.typical.patches == row["patches_per_batch"]
    gpu = card(row["card"])
    (after,) = (steps for key, steps in WARM_UP.items() if key in row)
    memory = found.memory_on(gpu)
    peak = memory.settling if still_records(found, after) else memory.settled
    assert peak / 2**30 == pytest.approx(row["peak_gib"], rel=MEMORY)
    assert found.step_on(gpu).seconds == pytest.approx(row["step_s"], rel=TIME)
