"""The stock side of the comparisons: plain transformers + PEFT + bitsandbytes, and samples for both sides."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

BATCHES = 32
_WORDS = ("seven", "pages", "of", "blue", "paper", "and", "one", "stamp")


def make_batches(count):
    """Return batches of two conversations with one or two pictures of several sizes; batch after batch, fixed."""
    rng = np.random.default_rng(0)

    def picture():
        height, width = (int(side) * 28 for side in rng.integers(1, 4, 2))
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype="uint8"))

    def sample(number):
        blocks = [{"type": "image", "image": picture()} for _ in range(1 + number % 2)]
        blocks.append({"type": "text", "text": "what is it"})
        answer = " ".join(_WORDS[: 2 + number % 5])
        return {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]}

    return [[sample(2 * number), sample(2 * number + 1)] for number in range(count)]


def stock_model(folder, *, four_bit, targets):
    """Load a base with plain transformers, and put a plain PEFT LoRA on it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual.merger", "lm_head"],
    )
    options = {"quantization_config": quantization} if four_bit else {}
    base = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", **options
    )
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))


def trainable(model):
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat_gradients(model):
    """Return the gradients of the trainable parameters by name."""
    return {name: p.grad.detach().clone() for name, p in trainable(model).items()}


def clones(batch):
    """Return a batch that shares no memory with ``batch``."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
