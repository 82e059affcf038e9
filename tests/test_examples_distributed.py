"""The example of several processes, with two on the CPU: started as its first lines say, it learns what one learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "distributed" / "train.py"


def run(folder: Path, processes: int, batch: int) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [str(PROGRAM), "--steps", "4", "--batch", str(batch), "--output", str(folder)]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_two_processes_learn_what_one_does_and_the_first_saves(tmp_path):
    said = {count: run(tmp_path / str(count), count, 4 // count) for count in (1, 2)}
    found = {
        count: [tuple(map(float, pair)) for pair in re.findall(rf"{count} processes: loss (\S+) to (\S+);", text)]
        for count, text in said.items()
    }
    assert [len(pairs) for pairs in found.values()] == [1, 1]  # said once, not by each
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-4)
    first, last = found[1][0]
    assert first != last
    AutoModelForImageTextToText.from_pretrained(tmp_path / "2" / "merged")
    assert (tmp_path / "2" / "adapter" / "adapter_model.safetensors").is_file()
