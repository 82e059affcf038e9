"""Compare the training step of several stacks on one checkpoint of real size.

    python -m benchmarks.train_step qwen2_vl-2b FOLDER [--workload ocr doc] [--stack fvlm hf liger unsloth]
        [--mode unsloth auto] [--steps 16] [--decode 64] [--out FILE.jsonl] [--commit HASH]

The checkpoint is made in FOLDER if it is not there. Every stack (without ``--stack``, every one that is installed)
trains in a process of its own on the same pixels and words. Their losses must agree within one percent with those of
the first stack that ran, else the run ends with status 1. Rows are appended to the file: seconds a step, tokens a
second, the share of the arithmetic limit (`benchmarks.training.arithmetic`, at the speed that this card's matrix
product reached just before), peak memory, seconds from the start of the process to the end of step 10, and tokens a
second of an answer afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels.card import ROOT, append_row, ceilings, provenance
from benchmarks.kernels.clock import Clock
from benchmarks.training.arithmetic import Counts, operations
from benchmarks.training.sizes import SIZES, write_checkpoint
from benchmarks.training.stacks import installed
from benchmarks.training.workloads import WORKLOADS

TOLERANCE = 0.01


def measure(stack: str, workload: str, mode: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run one worker; return its figures, or None where it failed."""
    command = [sys.executable, "-m", "benchmarks.training.worker", stack, str(options.folder), "--workload", workload]
    command += ["--mode", mode, "--optim", options.optim]
    for name in ("steps", "warmup", "decode"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{stack} failed on {workload}: {_last_line(done)}", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{stack} trained, and then could not answer: {_last_line(done)}", file=sys.stderr)
    row: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT "))
    return row


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no output"])[-1]


def apart(losses: list[float], others: list[float]) -> float:
    """Return the largest relative distance of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", nargs="+", default=["ocr"], choices=WORKLOADS)
    parser.add_argument("--stack", nargs="+", default=installed(), choices=installed())
    parser.add_argument("--mode", nargs="+", default=["unsloth"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--decode", type=int, default=64, help="tokens of the answer that is timed; 0: none is")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.size, options.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = ceilings(Clock(device), tiny=device.type == "cpu")["flops"]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is the workers' now
    status = 0
    for workload in options.workload:
        first: list[float] | None = None
        limit = 0.0
        for stack in options.stack:
            for mode in options.mode if stack in ("fvlm", "unsloth") else options.mode[:1]:
                row = measure(stack, workload, mode, options)
                if row is None:
                    status = 1
                    continue
                if first is None:
                    first = row["losses"]
                    limit = operations(str(options.folder), Counts(**row["step_brings"])) / speed
                distance = apart(row["losses"], first)
                status = status or int(distance > TOLERANCE)
                row |= {"limit_s": limit, "of_limit": limit / row["step_s"], "matmul_flops_s": speed}
                row |= {"model": options.size, "optim": options.optim, **provenance(device, options.commit)}
                print(_line(row, distance))
                append_row(row, options.out)
    return status


def _line(row: dict[str, Any], distance: float) -> str:
    peak = "" if row["peak_gib"] is None else f"  {row['peak_gib']:.2f} GiB"
    ten = "" if row["to_step_10_s"] is None else f"  step 10 ends after {row['to_step_10_s']:.1f} s"
    answer = "" if row["decode_tokens_s"] is None else f"  answers with {row['decode_tokens_s']:.1f} tokens/s"
    return (
        f"{row['model']} {row['workload']} {row['stack']} {row['mode']}: {row['step_s']:.3f} s a step  "
        f"{row['tokens_s']:.0f} tokens/s  {100 * row['of_limit']:.0f} % of the arithmetic limit{peak}  "
        f"load {row['load_s']:.1f} s{ten}{answer}  losses {100 * distance:.2f} % from the first's"
    )


if __name__ == "__main__":
    sys.exit(main())
