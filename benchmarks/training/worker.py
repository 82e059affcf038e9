"""Train one stack for a few steps and print what was measured as one line of JSON; `run` starts it.

    python -m benchmarks.training.worker STACK FOLDER [--workload ocr] [--steps 16] [--warmup 6] [--mode unsloth]
        [--decode 64]

A process of its own for each stack: what one of them patches, caches or leaves allocated is no other's business, and
the time from the start of the process to the end of the tenth step is what a user waits. The trained model then gives
an answer of some tokens, unless 0 are asked for; the line is printed before that as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from typing import Any

STARTED = time.time()


def train(options: argparse.Namespace) -> tuple[dict[str, object], Any, Any]:
    """Load, train, measure; return the figures, the model and its processor."""
    if options.stack == "unsloth":
        import unsloth  # noqa: F401  # it must come before transformers
    import torch
    from benchmarks.training.stacks import STACKS
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
    from benchmarks.training.arithmetic import Counts  # no stack's time to the tenth step is to have it in it

    ends = clock.ends
    steps = [later - earlier for earlier, later in itertools.pairwise(ends)][max(options.warmup - 1, 0) :]
    brings = Counts.of_step(ready, model.config, len(ready) / workload.accumulation)
    cuda = torch.cuda.is_available()
    row = {
        "stack": options.stack,
        "workload": options.workload,
        "mode": str(mode),
        "lengths": [batch["input_ids"].shape[1] for batch in ready],
        "step_s": statistics.median(steps),
        "tokens_s": brings.tokens / statistics.median(steps),
        "step_brings": asdict(brings),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
        "import_s": imported,
        "load_s": loaded,
        "to_step_10_s": ends[9] - STARTED if len(ends) > 9 else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "decode_tokens_s": None,
    }
    return row, model, processor


def decode_rate(options: argparse.Namespace, model: Any, processor: Any) -> float:
    """Return the tokens a second of one answer behind its prompt, once all is compiled and recorded."""
    from benchmarks.decoding.worker import SHORT, AnswerClock, prepare, prompt

    prepare(options.stack, model)
    clock = AnswerClock(model, prompt(processor, options.workload, 1, model.device))
    clock(8)
    clock(options.decode)
    return (options.decode - SHORT) / (clock(options.decode) - clock(SHORT))


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
    parser.add_argument("--decode", type=int, default=64)
    options = parser.parse_args()
    row, model, processor = train(options)
    print("RESULT " + json.dumps(row), flush=True)  # it stands, should answering fail
    if options.decode:
        row["decode_tokens_s"] = decode_rate(options, model, processor)
        print("RESULT " + json.dumps(row))


if __name__ == "__main__":
    main()
