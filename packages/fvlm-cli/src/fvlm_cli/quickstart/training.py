"""LoRA on vision and language, and the training of it on handwriting."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlm_cli.quickstart.reading import question

if TYPE_CHECKING:
    from fvlm_cli.quickstart.handwriting import Writing

RANK = 32
BATCH = 16
WORKERS = 4
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Training:
    """What training left behind beside the adapter.

    Attributes:
        losses: the mean loss of each step's batch, in nats a supervised token, in order.
        seconds: wall-clock time of the steps.
    """

    losses: tuple[float, ...]
    seconds: float


def add_adapter(model: Any, seed: int, checkpointing: bool | str = False) -> Any:
    """Put LoRA on the attention and the MLPs of the vision tower and the language model.

    Args:
        model: without an adapter.
        seed: of its initial weights.
        checkpointing: the gradient-checkpointing mode.
    """
    from fvlm_vision import FastVisionModel

    return FastVisionModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, use_gradient_checkpointing=checkpointing, random_state=seed
    )


def train(
    model: Any,
    processor: Any,
    writings: Sequence[Writing],
    *,
    steps: int,
    seed: int,
    on_step: Callable[[float], None],
) -> Training:
    """Train the adapter to transcribe ``writings``.

    Args:
        model: with its adapter.
        processor: its processor.
        writings: images and their texts.
        steps: optimizer steps of `BATCH` images.
        seed: of the order of the images.
        on_step: called after each step with its loss.
    """
    import torch
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig

    from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

    losses: list[float] = []
    on_gpu = model.device.type == "cuda"

    class Listen(TrainerCallback):
        def on_log(self, *unused: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
            if logs is not None and "loss" in logs:
                losses.append(logs["loss"])
                on_step(logs["loss"])

    with tempfile.TemporaryDirectory(prefix="fvlm-quickstart-") as scratch:
        config = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 10),
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=model.dtype == torch.bfloat16,
            fp16=model.dtype == torch.float16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
            dataloader_num_workers=WORKERS if on_gpu else 0,  # on the CPU they would take cores from the training
            seed=seed,
        )
        FastVisionModel.for_training(model)
        trainer = FastVisionTrainer(
            model=model,
            processing_class=processor,
            data_collator=FastVisionDataCollator(model, processor, train_on_responses_only=True),
            train_dataset=[{"messages": question(writing.image, writing.text)} for writing in writings],
            args=config,
            callbacks=[Listen()],
        )
        trainer.remove_callback(PrinterCallback)  # it would print every loss on stdout, which belongs to --json
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    FastVisionModel.for_inference(model)
    return Training(tuple(losses), seconds)
