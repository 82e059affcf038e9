"""Train one stack for a few steps and print what was measured as one line of JSON; `run` starts it.

    python -m benchmarks.training.worker STACK FOLDER [--workload ocr] [--steps 16] [--warmup 6] [--mode unsloth]

A process of its own for each stack: what one of them patches, caches or leaves allocated is no other's business, and
the time from the start of the process to the end of the tenth step is what a user waits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from typing import Any

STARTED = time.time()


def train(options: argparse.Namespace) -> dict[str, object]:
    """Load, train, measure."""
    from benchmarks.training.stacks import STACKS

    if options.stack == "unsloth":
        import unsloth  # noqa: F401  # it must come before transformers
    import torch
    from benchmarks.training.workloads import WORKLOADS, samples
    from transformers import set_seed

    imported = time.time() - STARTED
    begun = time.time()
    mode: bool | str = {"True": True, "False": False}.get(options.mode, options.mode)
    model, processor, collate = STACKS[options.stack](options.folder, mode)
    loaded = time.time() - begun
    workload = WORKLOADS[options.workload]
    data = samples(workload, 4 * workload.batch * workload.accumulation)
    ready = [collate(data[i : i + workload.batch]) for i in range(0, len(data), workload.batch)]
    clock = _clock(options.warmup)
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(3407)
        trainer = _trainer_of(options.stack)(
            model=model,
            args=training_arguments(
                options,
                1,  # one row is a batch that was collated beforehand
                workload.accumulation,
                scratch,
                gradient_checkpointing=bool(mode) and options.stack != "fvlm",
                gradient_checkpointing_kwargs={"use_reentrant": False},
            ),
            data_collator=lambda rows: dict(ready[rows[0]]),
            train_dataset=list(range(len(ready))),
            callbacks=[clock],
            **({"processing_class": processor} if options.stack == "fvlm" else {}),
        )
        trainer.train()
    ends = clock.ends
    steps = [later - earlier for earlier, later in itertools.pairwise(ends)][max(options.warmup - 1, 0) :]
    lengths = [batch["input_ids"].shape[1] for batch in ready]
    tokens = lengths[0] * workload.batch * workload.accumulation
    return {
        "stack": options.stack,
        "workload": options.workload,
        "mode": str(mode),
        "lengths": lengths,
        "step_s": statistics.median(steps),
        "tokens_s": tokens / statistics.median(steps),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
        "import_s": imported,
        "load_s": loaded,
        "to_step_10_s": ends[9] - STARTED if len(ends) > 9 else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _clock(warmup: int) -> Any:
    """Return a callback that notes when steps end, and forgets the peak memory of the first ``warmup``."""
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: object, **__: object) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.ends.append(time.time())
            if cuda and len(self.ends) == warmup:
                torch.cuda.reset_peak_memory_stats()

    return Clock()


def training_arguments(options: argparse.Namespace, batch: int, accumulation: int, scratch: str, **others: Any) -> Any:
    """Return a trainer's settings: the same for every stack, but for what `others` says."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=options.steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        optim=options.optim,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        bf16=cuda,
        use_cpu=not cuda,
        disable_tqdm=True,
        seed=3407,
        **others,
    )


def _trainer_of(stack: str) -> Any:
    """FVLM brings its own trainer; to the others stock's does right."""
    if stack == "fvlm":
        from fvlm_vision import FastVisionTrainer

        return FastVisionTrainer
    from transformers import Trainer

    return Trainer


def main() -> None:
    """Parse the arguments, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stack")
    parser.add_argument("folder")
    parser.add_argument("--workload", default="ocr")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--mode", default="unsloth")
    parser.add_argument("--optim", default="adamw_8bit")
    print("RESULT " + json.dumps(train(parser.parse_args())))


if __name__ == "__main__":
    main()
