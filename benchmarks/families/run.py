"""Take each family, at real size with random weights, from a checkpoint to an answer: load in 4 bit, train, generate.

    python -m benchmarks.families.run [--families qwen2_vl-2b mllama-11b …] [--steps 5] [--tokens 16] [--mode unsloth]
        [--folder FOLDER] [--limit SECONDS] [--budget SECONDS] [--out FILE.jsonl] [--commit HASH]

Every family has a process of its own and a folder for its checkpoint that is removed afterwards. What fails, or takes
longer than the limit, is reported and does not stop the others; no family is begun after the budget. The status is 1
unless all went well. Rows are appended to the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels.card import ROOT, append_row, provenance
from benchmarks.training.published import PUBLISHED
from benchmarks.training.sizes import SIZES

WORKER = (sys.executable, "-m", "benchmarks.families.worker")


class Worker:
    """A process that has imported everything, or is about to, and waits for its job."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            WORKER, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def work(self, job: dict[str, Any], limit: float) -> dict[str, Any] | str:
        """Return the row of a job, or why there is none."""
        try:
            output, _ = self._process.communicate(json.dumps(job) + "\n", timeout=limit)
        except subprocess.TimeoutExpired:
            return f"was not done after {limit:.0f} s"
        found = [line for line in output.splitlines() if line.startswith("RESULT ")]
        if not found:
            return f"status {self._process.returncode}: {self._last_words()}"
        row: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT "))
        return row

    def close(self) -> None:
        """End the process, wherever it is."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def _last_words(self, lines: int = 12) -> str:
        self._errors.seek(0)
        return "\n    ".join(self._errors.read().strip().splitlines()[-lines:]) or "no output"


def described(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    peaks = "".join(
        f"  {what} {row[f'{what}_peak_gib']:.2f} GiB"
        for what in ("load", "train", "generate")
        if f"{what}_peak_gib" in row
    )
    return (
        f"{row['name']}: {row['checkpoint_gb']:.1f} GB written in {row['write_s']:.1f} s  "
        f"loaded in {row['load_s']:.1f} s  "
        f"step {row['step_s']:.3f} s of {row['tokens_per_batch']} tokens  "
        f"loss {row['losses'][0]:.3f} → {row['losses'][-1]:.3f}  "
        f"{row['generated']} tokens in {row['generate_s']:.2f} s{peaks}  "
        f"{row['fused']}, {row['recorded_layers']} recorded"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(PUBLISHED), choices=SIZES, metavar="NAME")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--page", type=int, nargs=2, default=(896, 1120), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--mode", default="unsloth")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary folder if left out")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a family may take")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which none is begun")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        return _measure(options, Path(scratch))


def _measure(options: argparse.Namespace, scratch: Path) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun, status = time.monotonic(), 0
    spare: Worker | None = None
    for place, name in enumerate(options.families):
        if time.monotonic() - begun > options.budget:
            print(f"{', '.join(options.families[place:])}: not begun, {options.budget:.0f} s are over", flush=True)
            status = 1
            break
        worker = spare or Worker()
        spare = Worker() if place + 1 < len(options.families) else None
        job = {
            "name": name,
            "folder": str(scratch / name),
            "mode": options.mode,
            "steps": options.steps,
            "batch": options.batch,
            "tokens": options.tokens,
            "width": options.page[0],
            "height": options.page[1],
        }
        row = worker.work(job, options.limit)
        worker.close()
        shutil.rmtree(scratch / name, ignore_errors=True)
        if isinstance(row, str):
            print(f"{name} FAILED after {time.monotonic() - begun:.0f} s in all: {row}", flush=True)
            status = 1
            continue
        print(f"[{time.monotonic() - begun:.0f} s] {described(row)}", flush=True)
        append_row({"benchmark": "families", **row, **provenance(device, options.commit)}, options.out)
    if spare is not None:
        spare.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
