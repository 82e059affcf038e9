"""The profiles of missed goals run, and their floors move what the ops move; interpreted, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = """
import torch
from benchmarks.kernels import traffic

x, dy = torch.randn(2, 13, 300)
assert torch.equal(traffic.norm_rows(x), x)
assert torch.equal(traffic.norm_rows(x, dy), x + dy)
assert torch.equal(traffic.norm_rows(x, dy, trained=True), x + dy)
q, k, table = torch.randn(2, 3, 5, 24), torch.randn(2, 3, 2, 24), torch.randn(2, 3, 24)
assert all(map(torch.equal, traffic.tokens(q, k, table, table), (q, k)))
packed, absmax = torch.randint(256, (4096,), dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)
written, read = (traffic.words(packed, absmax, write=write) for write in (True, False))
codes = packed.view(torch.int32)
assert torch.equal(written.view(-1, 8)[:, 3], (codes >> 3).to(torch.int16))
assert torch.equal(read.int(), codes.view(2, 512).amax(1).to(torch.int16).int())
"""


def interpreted(*arguments, **kwargs):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, **kwargs
    )


def test_floors_move_what_the_ops_move():
    done = interpreted("-c", FLOORS)
    assert done.returncode == 0, done.stderr


def test_every_subject_gives_lines(tmp_path):
    done = interpreted(
        "-m", "benchmarks.kernels.why", "--tiny", "--commit", "abc", "--out", str(tmp_path / "why.jsonl")
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "why.jsonl").read_text(encoding="utf-8").splitlines()]
    ops = {"layer_norm", "rms_norm", "rotary", "multimodal_rotary", "gelu", "nf4", "nf4_matvec", "lora_mlp"}
    assert ops | {"linear_cross_entropy", "varlen_attention"} == {line["op"] for line in lines}
    assert all(line["us"] > 0 and line["commit"] == "abc" and line["what"] for line in lines)
    assert len({(line["op"], line["case"], line["what"]) for line in lines}) == len(lines)


def test_an_unknown_subject_is_a_usage_error():
    done = interpreted("-m", "benchmarks.kernels.why", "--tiny", "nothing")
    assert done.returncode == 2
    assert "no subject is called 'nothing'" in done.stderr
