"""Compare decoding by several stacks on one checkpoint of real size.

    python -m benchmarks.decoding.run qwen2_vl-2b FOLDER [--tokens 128] [--rows 1] [--stack fvlm hf unsloth]
        [--workload ocr] [--repeats 3] [--profile] [--out FILE.jsonl] [--commit HASH]

The checkpoint is made in FOLDER if it is not there. Every stack decodes in a process of its own from the same pixels
and words, with adapters of the same values. Where an answer first differs from that of the first stack is reported: in
bf16 two stacks round differently, and one token that is chosen differently changes all that follow; in fp32, on a CPU,
they must agree, else the run ends with status 1. Rows are appended to the file, without the answers.
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
from benchmarks.training.sizes import SIZES, write_checkpoint
from benchmarks.training.stacks import STACKS
from benchmarks.training.workloads import WORKLOADS


def measure(stack: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run one worker; return its figures, or None where it failed."""
    command = [sys.executable, "-m", "benchmarks.decoding.worker", stack, str(options.folder)]
    for name in ("workload", "tokens", "rows", "repeats"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.profile:
        command.append("--profile")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{stack} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
        return None
    if options.profile:
        print(done.stderr, file=sys.stderr)
    row: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT "))
    return row


def first_difference(answer: list[list[int]], other: list[list[int]]) -> int | None:
    """Return at which token two answers first differ in any row, or None."""
    columns = zip(zip(*answer, strict=True), zip(*other, strict=True), strict=True)
    return next((place for place, (a, b) in enumerate(columns) if a != b), None)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", default="ocr", choices=WORKLOADS)
    parser.add_argument("--stack", nargs="+", default=["fvlm", "hf"], choices=STACKS)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.size, options.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = ceilings(Clock(device), tiny=device.type == "cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is the workers' now
    status, first = 0, None
    for stack in options.stack:
        row = measure(stack, options)
        if row is None:
            status = 1
            continue
        answer = row.pop("answer")
        first = answer if first is None else first
        apart = first_difference(answer, first)
        if device.type == "cpu" and apart is not None:
            status = 1
        limit = card["bytes"] / row["read_bytes"]
        row |= {"model": options.size, "first_difference": apart, "limit_tokens_s": limit * options.rows}
        row |= provenance(device, options.commit)
        print(_line(options.size, row))
        append_row(row, options.out)
    return status


def _line(size: str, row: dict[str, Any]) -> str:
    peak = "" if row["peak_gib"] is None else f"  {row['peak_gib']:.2f} GiB"
    apart = "never" if row["first_difference"] is None else f"at token {row['first_difference']}"
    return (
        f"{size} {row['stack']} {row['rows']} rows: {row['tokens_s']:.1f} tokens/s "
        f"({100 * row['tokens_s'] / row['limit_tokens_s']:.1f} % of the limit by bandwidth)  first token "
        f"{row['first_token_s']:.3f} s  first call {row['first_call_s']:.1f} s{peak}  differs from the first {apart}"
    )


if __name__ == "__main__":
    sys.exit(main())
