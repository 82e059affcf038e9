"""Take one family from nothing to an answer, and print what was measured as one line of JSON; `run` starts it.

It imports everything first and then waits for a line on its standard input, the job as JSON, so that one can be ready
while another works.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.families.pages import samples
from benchmarks.training.sizes import write_checkpoint
from transformers import TrainerCallback
from trl import SFTConfig

from fvlm_core.checkpointing import graphs_of
from fvlm_core.fused import fusion_report
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

CUDA = torch.cuda.is_available()
RANK, ALPHA = 16, 32
MAX_SEQ_LENGTH = 8192


class StepEnds(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Note when the first step begins."""
        self.on_step_end()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note when a step has ended on the device."""
        if CUDA:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


@contextmanager
def _measured(row: dict[str, Any], what: str) -> Iterator[None]:
    """Put the seconds that a part takes into a row, and the most memory that it had."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    yield
    if CUDA:
        torch.cuda.synchronize()
        row[f"{what}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row[f"{what}_s"] = time.perf_counter() - begun


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Write the checkpoint, load it, train and generate.

    Args:
        job: `name` of the checkpoint (`benchmarks.training.sizes`), `folder` to write it to, `mode` of gradient
            checkpointing, `steps`, `batch`, `width` and `height` of a page, `tokens` to generate.
    """
    row: dict[str, Any] = {key: value for key, value in job.items() if key != "folder"}
    with _measured(row, "write"):
        write_checkpoint(job["name"], Path(job["folder"]))
    row["checkpoint_gb"] = sum(path.stat().st_size for path in Path(job["folder"]).iterdir()) / 1e9
    with _measured(row, "load"):
        model, processor = FastVisionModel.from_pretrained(
            job["folder"], max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=True, use_gradient_checkpointing=job["mode"]
        )
        model = FastVisionModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=job["mode"])
    row["fused"] = fusion_report(model).summary
    row["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _train(model, processor, job, row)
    _generate(model, processor, job, row)
    return row


def _train(model: Any, processor: Any, job: dict[str, Any], row: dict[str, Any]) -> None:
    pages = samples(job["batch"], job["width"], job["height"])
    collator = FastVisionDataCollator(model, processor)
    row["tokens_per_batch"] = collator(pages)["input_ids"].numel()
    ends = StepEnds()
    with tempfile.TemporaryDirectory() as scratch, _measured(row, "train"):
        FastVisionModel.for_training(model)
        args = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=job["batch"],
            max_steps=job["steps"],
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim="adamw_8bit" if CUDA else "adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=CUDA,
            use_cpu=not CUDA,
            train_sampling_strategy="sequential",
            dataloader_num_workers=2 if CUDA else 0,
            disable_tqdm=True,
        )
        # The same pages in every step: a layer is recorded when a shape comes back, which longer runs see often.
        data = pages * job["steps"]
        trainer = FastVisionTrainer(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=data,
            processing_class=processor,
            callbacks=[ends],
        )
        trainer.train()
    steps = [later - earlier for earlier, later in itertools.pairwise(ends.times)]
    row["steps_s"] = steps
    row["step_s"] = statistics.median(steps[len(steps) // 2 :])  # the first ones compile and record
    row["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    graphs = graphs_of(model)
    row["recorded_layers"] = None if graphs is None else graphs.recorded
    if not all(loss == loss and loss < float("inf") for loss in row["losses"]):
        raise ArithmeticError(f"the losses {row['losses']} are not all finite")


def _generate(model: Any, processor: Any, job: dict[str, Any], row: dict[str, Any]) -> None:
    (sample,) = samples(1, job["width"], job["height"])
    question = sample["messages"][:1]
    prompt = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    image = question[0]["content"][0]["image"]
    bos = processor.tokenizer.bos_token
    plain = {} if bos is None or not prompt.startswith(bos) else {"add_special_tokens": False}
    encoded = processor(text=[prompt], images=[[image]], return_tensors="pt", **plain)
    inputs = {name: value.to(model.device) for name, value in encoded.items() if name != "labels"}
    FastVisionModel.for_inference(model)
    with _measured(row, "generate"):
        out = model.generate(**inputs, max_new_tokens=job["tokens"], min_new_tokens=job["tokens"], do_sample=False)
    row["generated"] = int(out.shape[1] - inputs["input_ids"].shape[1])
    if row["generated"] != job["tokens"]:
        raise ArithmeticError(f"{row['generated']} tokens were generated where {job['tokens']} were asked for")


def main() -> None:
    """Wait for a job, do it, print its row."""
    line = sys.stdin.readline()
    if line.strip():
        print("RESULT " + json.dumps(work(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
