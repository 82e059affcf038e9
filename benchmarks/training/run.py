"""Compare the training step of several stacks on one checkpoint of real size.

    python -m benchmarks.training.run qwen2_vl-2b FOLDER [--workload ocr doc] [--stack fvlm hf liger unsloth]
        [--mode unsloth auto] [--steps 16] [--out FILE.jsonl] [--commit HASH]

The checkpoint is made in FOLDER if it is not there. Every stack trains in a process of its own on the same pixels and
words. Their losses must agree within one percent with those of the first stack that ran, else the run ends with status
1. Rows are appended to the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels.card import ROOT, append_row, provenance
from benchmarks.training.sizes import SIZES, write_checkpoint
from benchmarks.training.stacks import STACKS
from benchmarks.training.workloads import WORKLOADS

TOLERANCE = 0.01


def measure(stack: str, workload: str, mode: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run one worker; return its figures, or None where it failed."""
    command = [sys.executable, "-m", "benchmarks.training.worker", stack, str(options.folder), "--workload", workload]
    command += [
        "--mode",
        mode,
        "--steps",
        str(options.steps),
        "--warmup",
        str(options.warmup),
        "--optim",
        options.optim,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(
            f"{stack} failed on {workload}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr
        )
        return None
    row: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT "))
    return row


def apart(losses: list[float], others: list[float]) -> float:
    """Return the largest relative distance of two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", nargs="+", default=["ocr"], choices=WORKLOADS)
    parser.add_argument("--stack", nargs="+", default=["fvlm", "hf"], choices=STACKS)
    parser.add_argument("--mode", nargs="+", default=["unsloth"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.size, options.folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the memory is the workers' now
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    status = 0
    for workload in options.workload:
        first: list[float] | None = None
        for stack in options.stack:
            for mode in options.mode if stack in ("fvlm", "unsloth") else options.mode[:1]:
                row = measure(stack, workload, mode, options)
                if row is None:
                    status = 1
                    continue
                first = row["losses"] if first is None else first
                distance = apart(row["losses"], first)
                status = status or int(distance > TOLERANCE)
                row |= {"model": options.size, "optim": options.optim, **provenance(device, options.commit)}
                peak = "" if row["peak_gib"] is None else f"  {row['peak_gib']:.2f} GiB"
                print(
                    f"{options.size} {workload} {stack} {row['mode']}: {row['step_s']:.3f} s a step{peak}  load "
                    f"{row['load_s']:.1f} s  losses {100 * distance:.2f} % from the first's"
                )
                append_row(row, options.out)
    return status


if __name__ == "__main__":
    sys.exit(main())
