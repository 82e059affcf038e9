"""A tiny checkpoint, one batch from its real processor, and what the model tests ask of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from fvlm_core.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL in float32; read it, do not write into it."""
    return tiny_checkpoint("qwen2_vl", tmp_path_factory.mktemp("tiny") / "qwen2_vl")


@pytest.fixture(scope="session")
def prompt(folder: Path) -> dict[str, torch.Tensor]:
    """A user's turn with one image, as the real processor gives it."""
    return _encode(folder, answer=None)


@pytest.fixture(scope="session")
def batch(folder: Path) -> dict[str, torch.Tensor]:
    """A user's turn with one image and its answer, all of it labelled."""
    encoded = _encode(folder, answer="total amount due")
    return {**encoded, "labels": encoded["input_ids"]}


def _encode(folder: Path, answer: str | None) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "invoice number"}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    pixels = np.random.default_rng(0).integers(0, 255, (84, 112, 3), dtype=np.uint8)
    return dict(processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt"))


class Ask:
    """Questions to a model."""

    @staticmethod
    def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits in evaluation mode; the model's own mode is restored."""
        training = model.training
        model.eval()
        with torch.no_grad():
            out: torch.Tensor = model(**batch).logits
        model.train(training)
        return out

    @staticmethod
    def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss, and the gradient of everything that got one."""
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    @staticmethod
    def adapter(model: Any) -> dict[str, torch.Tensor]:
        """The LoRA weights by name."""
        return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}

    @staticmethod
    def train(model: Any, seed: int = 0) -> None:
        """Move every trainable value, as training would (LoRA's B starts at zero)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn(p.shape, generator=generator).to(p)


@pytest.fixture(scope="session")
def ask() -> type[Ask]:
    return Ask


@pytest.fixture
def adapted(folder: Path) -> Callable[..., Any]:
    """Make a model with LoRA in a precision; keyword arguments are those of get_peft_model."""
    from fvlm_vision import FastVisionModel

    def make(load: dict[str, Any] | None = None, **options: Any) -> Any:
        model, _ = FastVisionModel.from_pretrained(folder, **({"load_in_16bit": True} if load is None else load))
        return FastVisionModel.get_peft_model(model, **{"r": 4, "lora_alpha": 8, **options})

    return make
