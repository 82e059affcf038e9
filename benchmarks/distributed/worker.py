"""Train on one GPU or on several and print what was measured as one line of JSON; `run` starts it.

    python -m benchmarks.distributed.worker FOLDER --workload ocr
    torchrun --nproc-per-node 2 -m benchmarks.distributed.worker FOLDER --workload ocr

Each process takes a workload's batches as they are, so that two do twice the work of one (weak scaling). A process
alone also trains with twice the accumulation: on what two processes see in one step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.training.stacks import fvlm
from benchmarks.training.workloads import WORKLOADS, samples
from torch import distributed
from transformers import TrainerCallback
from trl import SFTConfig

from fvlm_vision import FastVisionTrainer

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
CUDA = torch.cuda.is_available()
MOST = 2
"""Processes that the data are laid out for."""


class Clock(TrainerCallback):
    """Notes when steps end, and forgets the peak memory of the first ones."""

    def __init__(self, warmup: int) -> None:
        self.ends: list[float] = []
        self.warmup = warmup

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the time."""
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if CUDA and len(self.ends) == self.warmup:
            torch.cuda.reset_peak_memory_stats()

    @property
    def step_s(self) -> float:
        """The median of the steps behind the warm-up, in seconds."""
        steps = [later - earlier for earlier, later in itertools.pairwise(self.ends)]
        return statistics.median(steps[max(self.warmup - 1, 0) :])


class Bench:
    """A model, its batches, and the runs over them.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.workload = WORKLOADS[options.workload]
        self.model, self.processor, collate = fvlm(options.folder, options.mode)
        batch = self.workload.batch
        data = samples(self.workload, 2 * MOST * batch * self.workload.accumulation)
        self.batches = [collate(data[i : i + batch]) for i in range(0, len(data), batch)]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]

    def run(self, accumulation: int, **settings: Any) -> dict[str, Any]:
        """Train from the start; return the figures."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)
        clock = Clock(self.options.warmup)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = self._trainer(scratch, clock, accumulation, settings)
            trainer.train()
            waits = self._waits(trainer) if CUDA else None
        step_s, history = clock.step_s, trainer.state.log_history
        del trainer  # and with it DDP's buckets, which the next run would hold beside its own
        gc.collect()
        losses = [entry["loss"] for entry in history if "loss" in entry]
        own = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None, "waits": waits}
        own["weights"] = float(sum(p.detach().double().abs().sum() for p in self.trained))
        return {"step_s": step_s, "losses": losses, "accumulation": accumulation, "ranks": _gathered(own)}

    def _trainer(self, scratch: str, clock: Clock, accumulation: int, settings: dict[str, Any]) -> FastVisionTrainer:
        arguments = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=1,  # one row is a batch that was collated beforehand
            gradient_accumulation_steps=accumulation,
            max_steps=self.options.steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim=self.options.optim,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            train_sampling_strategy="sequential",
            bf16=CUDA,
            use_cpu=not CUDA,
            dataloader_pin_memory=CUDA,
            disable_tqdm=True,
            seed=3407,
            **settings,
        )
        return FastVisionTrainer(
            model=self.model,
            args=arguments,
            data_collator=lambda rows: dict(self.batches[rows[0]]),
            train_dataset=list(range(len(self.batches))),
            callbacks=[clock],
            processing_class=self.processor,
        )

    def _waits(self, trainer: FastVisionTrainer) -> str | None:
        """Take three steps more, the last of which may not wait for the device; return what did, or None."""
        model, optimizer = trainer.model_wrapped, trainer.optimizer
        batch = trainer._prepare_inputs(dict(self.batches[RANK]))
        count = torch.tensor(100 * WORLD, device="cuda")
        model.train()
        found = None
        for turn in range(3):
            if turn == 2:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            part = "the forward pass"
            try:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(**batch, use_cache=False, num_items_in_batch=count).loss
                part = "the backward pass"
                loss.backward()
                part = "the optimizer"
                trainer._clip_grad_norm(model)
                optimizer.step()
                optimizer.zero_grad()
            except RuntimeError as error:
                if turn != 2:
                    raise
                found = f"{part}: {str(error).splitlines()[0]}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return found


def _gathered(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what every process has, in the order of their ranks."""
    if WORLD == 1:
        return [own]
    every: list[Any] = [None] * WORLD
    distributed.all_gather_object(every, own)
    return every


def runs(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the runs of a process alone, or of several."""
    usual = bench.workload.accumulation
    if WORLD == 1:
        return {"one": lambda: bench.run(usual), "doubled": lambda: bench.run(MOST * usual)}
    return {
        "several": lambda: bench.run(usual),
        "several_all_used": lambda: bench.run(usual, ddp_find_unused_parameters=False),
    }


def main() -> None:
    """Parse the arguments, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--workload", default="ocr", choices=WORKLOADS)
    parser.add_argument("--mode", default="unsloth")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--optim", default="adamw_8bit")
    bench = Bench(parser.parse_args())
    for name, run in runs(bench).items():
        figures = run()
        if RANK == 0:
            print("RESULT " + json.dumps({"run": name, "world": WORLD, **figures}), flush=True)
    if WORLD > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
