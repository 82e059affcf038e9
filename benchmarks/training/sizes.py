"""Checkpoints of real size with random weights: what a training step costs does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from benchmarks.training.published import PUBLISHED
from benchmarks.training.workloads import WORDS
from transformers import AutoModelForImageTextToText, GenerationConfig

from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_core.testing.checkpoint import blueprint

TINY = {"tiny": "qwen2_vl"} | {f"tiny-{family}": family for family in FAMILIES}
"""Names of tiny checkpoints, for the tests of the benchmarks themselves → their families."""

SIZES = (*TINY, *PUBLISHED)
"""What `write_checkpoint` can write."""

_DERIVED = ("head_dim", "layer_types")  # what a config works out from widths and depths, where they are not given


def real_config(name: str) -> tuple[Any, Any]:
    """Return the config of one of `PUBLISHED`, and the processor that goes with it."""
    size = PUBLISHED[name]
    plan = blueprint(size["family"])
    values = plan.config.to_dict() | size.get("config", {})
    for part in ("text", "vision"):
        own = values[f"{part}_config"]
        values[f"{part}_config"] = {key: value for key, value in own.items() if key not in _DERIVED} | size[part]
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = size["tied"]
    return type(plan.config).from_dict(values), _processor(plan.processor, size)


def _processor(tiny: Any, size: dict[str, Any]) -> Any:
    parts = {name: getattr(tiny, name) for name in tiny.get_attributes()}
    # The tiny tokenizers would cut most of these words into four: rows would be half as long again as a real one's.
    pairs = [f"{number:02}" for number in range(100)]
    parts["tokenizer"].add_tokens([*pairs, *(space + word for word in WORDS for space in ("", " "))])
    images = tiny.image_processor
    parts["image_processor"] = type(images).from_dict({**images.to_dict(), **size["image"]})
    if "tokens" in size:
        parts["tokenizer"].add_special_tokens(
            {"additional_special_tokens": size["tokens"]}, replace_extra_special_tokens=False
        )
    return type(tiny)(**parts, chat_template=tiny.chat_template, **size.get("processor", {}))


def write_checkpoint(name: str, folder: Path) -> None:
    """Write a checkpoint of one of `SIZES` with its processor; those of `PUBLISHED` in bfloat16, made on a GPU."""
    if name in TINY:
        tiny_checkpoint(TINY[name], folder)
        return
    config, processor = real_config(name)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    _open_gates(model)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)


@torch.no_grad()
def _open_gates(model: torch.nn.Module) -> None:
    """Let through what gates of one number hold back, which are made shut: no image would reach Llama 3.2's words."""
    for parameter in model.parameters():
        if parameter.numel() == 1:
            parameter.fill_(0.1)
