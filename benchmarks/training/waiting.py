"""Measure how long a training step waits for its data: images that dataloader workers decode while it trains.

    python -m benchmarks.training.waiting qwen2_vl-2b FOLDER [--workload ocr] [--workers 4 0] [--source JPEG]
        [--repeat 1] [--steps 16] [--warmup 6] [--mode unsloth] [--out FILE.jsonl] [--commit HASH]

The checkpoint is made in FOLDER if it is not there. The same samples are trained on first as batches that lie ready in
memory, then from encoded images by so many workers, in one process, so that the difference of the steps is the data's
price. The device has finished the step before when the next batches are fetched: the time until they are there is
time in which it does nothing. With ready batches that is what the trainer itself takes. `loader` is the rate of the
same dataloader when nothing trains.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels.card import append_row, provenance
from benchmarks.training.run import TOLERANCE, apart
from benchmarks.training.sizes import SIZES, write_checkpoint
from benchmarks.training.stacks import STACKS
from benchmarks.training.worker import training_arguments
from benchmarks.training.workloads import WORKLOADS, Workload, samples
from transformers import TrainerCallback, set_seed

from fvlm_vision import FastVisionTrainer

KEPT = 4  # steps' worth of samples, repeated to one epoch: where an epoch begins, workers start
SOURCES = ("JPEG", "PNG", "PIL")


class WaitingTrainer(FastVisionTrainer):
    """Notes how long each step waits for its batches, and how long it takes with the wait."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waits: list[float] = []
        self.ends: list[float] = []
        self.add_callback(_Clock(self.ends))

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Fetch the batches of a step."""
        _finish()
        start = time.perf_counter()
        fetched = super().get_batch_samples(*arguments, **options)
        self.waits.append(time.perf_counter() - start)
        return fetched


class _Clock(TrainerCallback):
    """Notes when steps end on the device."""

    def __init__(self, ends: list[float]) -> None:
        self.ends = ends

    def on_step_end(self, *_: object, **__: object) -> None:
        _finish()
        self.ends.append(time.perf_counter())


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def encoded(rows: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Return samples whose image is a file's bytes; "PIL" leaves it open."""
    for row in rows if source != "PIL" else ():
        block = row["messages"][0]["content"][0]
        buffer = io.BytesIO()
        block["image"].save(buffer, source)
        block["image"] = buffer.getvalue()
    return rows


def arguments_of(options: argparse.Namespace, workload: Workload, workers: int | None, scratch: str) -> Any:
    """Return the trainer's settings; `workers` None: a row is a batch that lies ready."""
    batch = 1 if workers is None else workload.batch
    return training_arguments(options, batch, workload.accumulation, scratch, dataloader_num_workers=workers or 0)


def trained(trainer: WaitingTrainer, warmup: int) -> dict[str, Any]:
    """Train; return the seconds of a step and of its wait, after `warmup` steps."""
    set_seed(3407)
    trainer.train()
    steps = [end - start for start, end in zip(trainer.ends, trainer.ends[1:], strict=False)][max(warmup - 1, 0) :]
    waits = trainer.waits[warmup : len(trainer.ends)]
    return {
        "step_s": statistics.median(steps),
        "wait_s": statistics.median(waits),
        "longest_wait_s": max(waits),
        "waited": sum(waits) / sum(steps),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and store; return the exit status: 1 where the losses part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", default="ocr", choices=WORKLOADS)
    parser.add_argument("--workers", type=int, nargs="+", default=[4])
    parser.add_argument("--source", default="JPEG", choices=SOURCES)
    parser.add_argument("--mode", default="unsloth")
    parser.add_argument("--repeat", type=int, default=1, help="how often all of it is measured, in turns")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(arguments)
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.size, options.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measured(options)
    for row in rows:
        row |= {"op": "waiting", "model": options.size, "workload": options.workload, "source": options.source}
        row |= {"mode": options.mode, "cores": os.cpu_count(), **provenance(device, options.commit)}
        print(
            f"{options.size} {options.workload} {options.source}, {row['data']}: {row['step_s']:.4f} s a step; "
            f"{row['wait_s'] * 1e3:.2f} ms of it wait for data (longest {row['longest_wait_s'] * 1e3:.1f} ms, "
            f"{row['waited']:.2%} of the time), {row['images_s']:.1f} images/s"
            + (f"; the loader alone {row['loader_images_s']:.1f} images/s" if "loader_images_s" in row else "")
        )
        append_row(row, options.out)
    return int(any(apart(row["losses"], rows[0]["losses"]) > TOLERANCE for row in rows))


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for ready batches and one for each number of workers."""
    workload = WORKLOADS[options.workload]
    per_step = workload.batch * workload.accumulation
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for workers in (None, *options.workers) * options.repeat:
            # Loaded anew, so that each starts from the same weights; the checkpoint is in the system's cache by now.
            model, processor, collator = STACKS["fvlm"](str(options.folder), options.mode)
            data = encoded(samples(workload, KEPT * per_step), options.source)
            epoch = 1 + options.steps // KEPT
            settings = arguments_of(options, workload, workers, scratch)
            if workers is None:
                ready = [collator(data[i : i + workload.batch]) for i in range(0, len(data), workload.batch)]
                trainer = WaitingTrainer(
                    model=model,
                    args=settings,
                    data_collator=lambda numbers, ready=ready: dict(ready[numbers[0]]),
                    train_dataset=list(range(len(ready))) * epoch,
                    processing_class=processor,
                )
            else:
                data *= epoch
                trainer = WaitingTrainer(model=model, args=settings, data_collator=collator, train_dataset=data)
            row = {"data": "ready batches" if workers is None else f"{workers} workers"}
            if workers is not None:
                row["loader_images_s"] = loader_rate(trainer, workload.batch)
            row |= trained(trainer, options.warmup)
            found.append({**row, "images_s": per_step / row["step_s"]})
            del model, trainer, collator
    return found


def loader_rate(trainer: WaitingTrainer, batch: int) -> float:
    """Return the images a second of a trainer's own dataloader while nothing trains, once its workers have started."""
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    start = time.perf_counter()
    made = sum(1 for _ in batches) - 1  # accelerate's loader is one batch ahead: the last was there already
    return made * batch / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
