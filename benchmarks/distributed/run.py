"""Training on one GPU against training on two: time, memory, and that both learn the same.

    python -m benchmarks.distributed.run qwen2_vl-2b FOLDER [--workload ocr doc] [--mode unsloth] [--steps 12]
        [--balanced] [--out FILE.jsonl] [--commit HASH]

The checkpoint is made in FOLDER if it is not there. The run ends with status 1 where two processes do not follow one
that sees the same batches, where their weights part, where a step waits for the device, or where a worker fails.
`--balanced` also trains one process whose model lies on both GPUs. Rows are appended to the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels.card import ROOT, append_row, provenance
from benchmarks.training.run import apart
from benchmarks.training.sizes import SIZES, write_checkpoint
from benchmarks.training.workloads import WORKLOADS

TOLERANCE = 0.01
"""How far a loss may be from the other run's, relative: sums in bfloat16 have another order, and Adam divides."""
WORLD = 2
LIMIT_S = 300


def worker(module: str, world: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run a worker in one process or in several; return its figures, which are none where it failed."""
    start = [sys.executable, "-m"]
    if world > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"]
    try:
        done = subprocess.run(
            [*start, module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        print(f"{module} on {world} took longer than {LIMIT_S} s", file=sys.stderr)
        return []
    found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not found:
        print(f"{module} on {world} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
        return []
    return [json.loads(line) for line in found]


def judge(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is wrong with a workload's rows, by run."""
    wrong = [f"there is no row of {name!r}" for name in ("one", "doubled", "several") if name not in rows]
    if wrong:
        return wrong
    for name in ("several", "several_all_used"):
        if name not in rows:
            continue
        distance = apart(rows[name]["losses"], rows["doubled"]["losses"])
        if distance > TOLERANCE:
            wrong.append(f"{name}: losses are {100 * distance:.2f} % from one process's on the same batches")
        if len({rank["weights"] for rank in rows[name]["ranks"]}) != 1:
            wrong.append(f"{name}: the processes' weights differ")
    for name, row in rows.items():
        wrong += [f"{name}: a step waits: {rank['waits']}" for rank in row["ranks"] if rank["waits"] is not None]
    return wrong


def tell(workload: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print a workload's figures."""
    for name, row in rows.items():
        text = f"{workload} {name}: {row['step_s']:.3f} s a step"
        peaks = [rank["peak_gib"] for rank in row["ranks"] if rank["peak_gib"] is not None]
        text += f"  {', '.join(f'{peak:.2f}' for peak in peaks)} GiB" if peaks else ""
        if row["world"] > 1 and {"one", "doubled"} <= set(rows):
            text += f"  efficiency {100 * rows['one']['step_s'] / row['step_s']:.1f} %"
            text += f"  losses {100 * apart(row['losses'], rows['doubled']['losses']):.3f} % from one process's"
        print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", nargs="+", default=["ocr", "doc"], choices=WORKLOADS)
    parser.add_argument("--mode", default="unsloth")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store; return the exit status."""
    options = _parser().parse_args(arguments)
    options.folder = options.folder.resolve()
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.size, options.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = ["--mode", options.mode, "--steps", str(options.steps), "--warmup", str(options.warmup)]
    shared += ["--optim", options.optim]
    wrong: list[str] = []
    for workload in options.workload:
        given = [str(options.folder), "--workload", workload, *shared]
        found = [row for world in (1, WORLD) for row in worker("benchmarks.distributed.worker", world, given)]
        rows = {row["run"]: row for row in found}
        tell(workload, rows)
        wrong += [f"{workload} {sentence}" for sentence in judge(rows)]
        about = {"model": options.size, "workload": workload, "mode": options.mode, "optim": options.optim}
        for row in found:
            append_row({**about, **row, **provenance(device, options.commit)}, options.out)
    if options.balanced:
        found = worker("benchmarks.distributed.balanced", 1, [str(options.folder)])
        wrong += [] if found else ["the model on two GPUs failed"]
        for row in found:
            print(f"balanced: {row}")
            wrong += [] if row["right"] else ["the model on two GPUs computes something else"]
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
