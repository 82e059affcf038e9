"""Tiny checkpoints, images and samples for the tests of the data path and the trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTConfig

from fvlm_core.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint, made once a session."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def processor_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """A fresh processor of a family."""
    return lambda family: AutoProcessor.from_pretrained(checkpoint(family))


@pytest.fixture(scope="session")
def model_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """A fresh tiny model of a family."""
    return lambda family: AutoModelForImageTextToText.from_pretrained(checkpoint(family))


@pytest.fixture(scope="session")
def shared_model_of(model_of: Callable[[str], Any]) -> Callable[[str], Any]:
    """A family's tiny model, loaded once a session, for tests that do not change it."""
    return cache(model_of)


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """A random RGB image of a given size in pixels, different for each seed."""

    def make(width: int = 60, height: int = 60, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="session")
def ask(picture: Callable[..., Image.Image]) -> Callable[..., dict[str, Any]]:
    """A one-question conversation with images inline."""

    def make(
        answer: str = "invoice 42", images: int = 1, seed: int = 0, question: str = "Read this."
    ) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = [
            {"type": "image", "image": picture(60 + 20 * n, 60, seed + n)} for n in range(images)
        ]
        return {
            "messages": [
                {"role": "user", "content": [*blocks, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
        }

    return make


class StepLosses(TrainerCallback):
    """The unrounded loss of every logged step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture
def lora(model_of):
    """A tiny Qwen2-VL with the same LoRA at every call, on vision and language."""

    def make(r=4):
        model = model_of("qwen2_vl")
        torch.manual_seed(0)
        config = LoraConfig(r=r, lora_alpha=8, target_modules=["q_proj", "v_proj", "qkv", "fc1", "down_proj"])
        return get_peft_model(model, config)

    return make


@pytest.fixture
def processor(processor_of):
    return processor_of("qwen2_vl")


@pytest.fixture
def rows(ask):
    return [ask(images=n % 3, seed=n, answer=f"total {n} " * (1 + n % 4)) for n in range(8)]


@pytest.fixture
def arguments(tmp_path):
    """Settings of a short run on the CPU."""

    def make(kind=SFTConfig, **changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "max_steps": 3,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return kind(**{**settings, **changes})

    return make


@pytest.fixture
def trained():
    """Trains and returns the unrounded loss of every step."""

    def run(trainer, **options) -> list[float]:
        losses = StepLosses()
        trainer.add_callback(losses)
        trainer.train(**options)
        return losses.losses

    return run
