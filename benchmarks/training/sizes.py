"""Checkpoints of real size with random weights: what a training step costs does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from fvlm_core.testing import tiny_checkpoint
from fvlm_core.testing.checkpoint import blueprint

PATCH = 14
PIXELS = {"shortest_edge": 16 * PATCH**2, "longest_edge": 4 * PATCH**2 * 1280}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"family": "qwen2_vl"},
    "qwen2_vl-2b": {
        "family": "qwen2_vl",
        "text": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
        },
        "vision": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
        "tied": True,
    },
    "qwen2_5_vl-7b": {
        "family": "qwen2_5_vl",
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tied": False,
    },
}
"""Widths and depths of the published configurations; "tiny" is for the test of the benchmark itself."""


def real_config(name: str) -> tuple[Any, Any]:
    """Return the config of one of `SIZES`, and the processor that goes with it."""
    size = SIZES[name]
    plan = blueprint(size["family"])
    values = plan.config.to_dict()
    values["text_config"] |= {**size["text"], "rope_parameters": _ROPE, "layer_types": None}
    values["vision_config"] |= size["vision"]
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = size["tied"]
    plan.processor.image_processor.size = dict(PIXELS)
    return type(plan.config).from_dict(values), plan.processor


def write_checkpoint(name: str, folder: Path) -> None:
    """Write a checkpoint of one of `SIZES` with its processor, in bfloat16."""
    if name == "tiny":
        tiny_checkpoint(SIZES[name]["family"], folder)
        return
    config, processor = real_config(name)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)
