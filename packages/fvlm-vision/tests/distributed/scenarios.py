"""Training runs that two processes and one must do alike; run by `test_distributed.py`, alone or under torchrun.

    python scenarios.py CHECKPOINT OUT NAME...
    python -m torch.distributed.run --standalone --nproc-per-node 2 scenarios.py CHECKPOINT OUT NAME...

Every process writes what it found to OUT/NAME-WORLD-RANK.pt. A process alone takes batches as large as those of all
processes together.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import datasets
import torch
from conversations import mixed, sample
from trl import SFTConfig

from fvlm_core.checkpointing import graphs_of, use_graphs
from fvlm_core.graphs import LayerGraphs, layer
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # as conftest.py: one arithmetic on every CPU
GPU = torch.cuda.is_available()
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
STEPS = 5
PER_RANK = 2


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def starting(model: Any) -> list[torch.Tensor]:
    """What adapters start from: nowhere zero, so that every matrix has a gradient from the first step on."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(parameter.shape, generator=generator) * 0.05 for parameter in trained(model)]


def train(
    checkpoint: Path,
    scratch: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    load: dict[str, Any] | None = None,
    adapt: dict[str, Any] | None = None,
    collate: dict[str, Any] | None = None,
    graphs: LayerGraphs | None = None,
    resume: str | None = None,
    **settings: Any,
) -> tuple[FastVisionTrainer, Any]:
    """Train for a few steps; return the trainer and the processor."""
    model, processor = FastVisionModel.from_pretrained(checkpoint, **(load or {"load_in_16bit": True}))
    if graphs is not None:
        use_graphs(model, graphs)
    model = FastVisionModel.get_peft_model(model, **{"r": 4, "lora_alpha": 8, **(adapt or {})})
    with torch.no_grad():
        for parameter, value in zip(trained(model), starting(model), strict=True):
            parameter.copy_(value)
    batch = settings.pop("per_device_train_batch_size", PER_RANK) * (2 if WORLD == 1 else 1)
    given = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not GPU,
        "dataloader_pin_memory": GPU,
    }
    evaluate = settings.pop("eval_dataset", None)
    trainer = FastVisionTrainer(
        model=model,
        processing_class=processor,
        data_collator=FastVisionDataCollator(model, processor, **(collate or {})),
        train_dataset=rows or [sample(number) for number in range(40)],
        eval_dataset=evaluate,
        args=SFTConfig(**{**given, **settings}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, processor


def found(trainer: FastVisionTrainer, **more: Any) -> dict[str, Any]:
    """What the runs are compared by."""
    history = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
        "accuracies": [entry["mean_token_accuracy"] for entry in history if "loss" in entry],
        "weights": {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
        **more,
    }


def plain(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    return found(train(checkpoint, scratch)[0])


def accumulated(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    return found(train(checkpoint, scratch, gradient_accumulation_steps=2, per_device_train_batch_size=1)[0])


def packed(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    return found(train(checkpoint, scratch, collate={"packing": True})[0])


def frozen(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    trainer, _ = train(checkpoint, scratch, adapt={"finetune_vision_layers": False})
    return found(trainer, find_unused=trainer.args.ddp_find_unused_parameters)


def without_images(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    return found(train(checkpoint, scratch, rows=[mixed(number) for number in range(40)])[0])


def without_images_at_all(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    return found(train(checkpoint, scratch, rows=[sample(number, image=False) for number in range(40)])[0])


def recorded(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Fused and recorded layers in 4 bit; each rank has another budget for what its layers keep."""
    return _recorded(checkpoint, scratch, LayerGraphs(rehearse=True, memory_budget=(None, 0.0001)[RANK]))


def short(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Memory runs out in a layer of the last process alone, which goes on with what its layers kept given back."""
    replay, calls = layer._replay, 0

    def short_of_memory(tape: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 15 and RANK == WORLD - 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        replay(tape)

    layer._replay = short_of_memory
    try:
        return _recorded(checkpoint, scratch, LayerGraphs(rehearse=True))
    finally:
        layer._replay = replay


def stuck(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Memory runs out in the last process outside of layers, for a batch that it cannot repeat alone."""
    loss = FastVisionTrainer.compute_loss

    def short_of_memory(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3 and RANK == WORLD - 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(trainer, *args, **kwargs)

    FastVisionTrainer.compute_loss = short_of_memory
    return _recorded(checkpoint, scratch, LayerGraphs(rehearse=True))


def _recorded(checkpoint: Path, scratch: Path, graphs: LayerGraphs) -> dict[str, Any]:
    trainer, _ = train(
        checkpoint,
        scratch,
        load={"load_in_4bit": True, "fused_layers": True, "device_map": "cpu"},
        graphs=graphs,
        adapt={"use_gradient_checkpointing": "auto"},
        rows=[sample(number % 4) for number in range(40)],
    )
    running = graphs_of(trainer.model)
    kept = sum(layer.kept for kind in running._stages.values() for layer in kind.layers.values())
    return found(trainer, recorded=running.recorded, replayed=running.replayed, kept=kept)


def on_gpus(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """What a user gets on GPUs: 4 bit, fused and recorded layers, flat parameters; rank 1 sees no image at times."""
    trainer, _ = train(
        checkpoint,
        scratch,
        load={"load_in_4bit": True, "dtype": torch.float32},
        adapt={"use_gradient_checkpointing": "auto" if RANK else "offload"},
        rows=[mixed(number) for number in range(4)] * 10,
        max_steps=8,
    )
    running = graphs_of(trainer.model)
    devices = sorted({p.device.index for p in trainer.model.parameters()})
    pairs = zip(trained(trainer.model), starting(trainer.model), strict=True)
    moved = torch.cat([(parameter.detach().cpu() - value).flatten() for parameter, value in pairs])
    flat = trainer._flat is not None
    counts = {"recorded": running.recorded, "replayed": running.replayed, "off": running._off}
    return found(trainer, **counts, devices=devices, flat=flat, moved=moved)


def skipped(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Samples over the limit are left out: all of rank 1's in the second step and in the evaluation's first batch."""
    rows = [sample(number, words=200 if number in (6, 7) else None) for number in range(40)]
    # One process: rows 0 and 1, then 6 and 7. Two: rank 0 has 0 and 1, then nothing; rank 1 nothing, then 6 and 7.
    evaluation = [sample(number, words=200 if number in (2, 3, 4, 5) else 4) for number in range(8)]
    trainer, _ = train(
        checkpoint,
        scratch,
        rows=rows,
        collate={"max_seq_length": 120, "overflow": "skip"},
        eval_dataset=evaluation,
        eval_strategy="steps",
        eval_steps=2,
    )
    return found(
        trainer, eval_losses=[entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    )


def streamed(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Rows and evaluation rows as streams: every process reads its own, whatever accelerate's default is."""
    rows, evaluation = (datasets.IterableDataset.from_generator(generate, gen_kwargs={"count": n}) for n in (40, 8))
    trainer, _ = train(checkpoint, scratch, rows=rows, eval_dataset=evaluation, eval_strategy="steps", eval_steps=2)
    return found(
        trainer, eval_losses=[entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    )


def generate(count: int) -> Any:
    """Rows of a stream, whose pictures are PNG files in memory."""
    for number in range(count):
        row = sample(number)
        row["messages"][1]["content"] = "seven pages"  # as many tokens in all: a loss is the mean of batches' means
        for block in row["messages"][0]["content"]:
            if "image" in block:
                file = io.BytesIO()
                block["image"].save(file, "PNG")
                block["image"] = {"bytes": file.getvalue()}
        yield {"row": number, "messages": row["messages"]}


def grouped(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Rows grouped by length: the processes must agree on the order, and see every row once."""
    rows = [sample(number) for number in range(16)]
    trainer, _ = train(checkpoint, scratch, rows=rows, train_sampling_strategy="group_by_length", max_steps=4)
    order = list(trainer._get_train_sampler())
    return found(trainer, order=order)


def resumed(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    train(checkpoint, scratch, save_strategy="steps", save_steps=3, max_steps=3)
    trainer, _ = train(checkpoint, scratch, resume=str(scratch / "checkpoint-3"))
    files = sorted(path.name for path in (scratch / "checkpoint-3").iterdir())
    return found(trainer, files=files)


def merged(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Every process asks for the merged model; one writes it."""
    trainer, processor = train(checkpoint, scratch, max_steps=2)
    path = trainer.model.save_pretrained_merged(scratch / "merged", processor)
    trainer.accelerator.wait_for_everyone()
    return found(trainer, path=str(path), files=sorted(file.name for file in path.iterdir()))


def saved(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Every process saves an adapter and a model without one, into folders of its own; the first process writes."""
    trainer, _ = train(checkpoint, scratch)
    launched = os.environ.pop("RANK", None)  # what tells is the process group, not how it was started
    whole, _ = FastVisionModel.from_pretrained(checkpoint, full_finetuning=True)
    for kind, model in {"adapter": trainer.model, "whole": whole}.items():
        model.save_pretrained(scratch / f"{kind}-of-{RANK}")
        if kind == "adapter":  # of a whole model, transformers has the last word
            model.save_pretrained(scratch / f"{kind}-of-{RANK}-asked", is_main_process=True)
        model.save_pretrained(scratch / f"{kind}-of-{RANK}-declined", is_main_process=False)
    if launched is not None:
        os.environ["RANK"] = launched
    trainer.accelerator.wait_for_everyone()
    folders = {path.name: sorted(file.name for file in path.iterdir()) for path in scratch.glob("*-of-*")}
    return found(trainer, folders=folders)


def main(arguments: list[str]) -> None:
    checkpoint, out, *names = arguments
    for name in names:
        scratch = Path(out) / f"{name}-{WORLD}"
        result = globals()[name](Path(checkpoint), scratch)
        torch.save(result, Path(out) / f"{name}-{WORLD}-{RANK}.pt")
        print(f"{name} done by {RANK} of {WORLD}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
