"""Tiny Qwen2-VL."""

from __future__ import annotations

from typing import Any

import transformers

from fvlm_core.testing.chat import ChatStyle, chat_template
from fvlm_core.testing.checkpoint import Blueprint
from fvlm_core.testing.tokenizer import VOCAB_SIZE, tiny_tokenizer

_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_STYLE = ChatStyle(turn="<|im_start|>{role}\n", end="<|im_end|>", gap="\n", image=_IMAGE, video=_VIDEO)
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped, and k_proj still 64 wide
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}  # head size 32 / 2


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    return tiny_tokenizer(_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>", named=named)


def _ids(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in names.items()}


def _text(tokenizer: transformers.PreTrainedTokenizerFast, **extra: Any) -> dict[str, Any]:
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**_TEXT, **ids, "rope_parameters": dict(_MROPE), **extra}


def _pixels(patch: int) -> dict[str, int]:
    """From 2 × 2 to 4 × 4 merged patches an image: few enough tokens for a quick test, still of many shapes."""
    side = 2 * patch  # one merged patch
    return {"shortest_edge": 4 * side * side, "longest_edge": 16 * side * side}


def qwen2_vl() -> Blueprint:
    """Two text layers, two vision blocks, tied embeddings as in the 2B model."""
    tokenizer = _tokenizer()
    config = transformers.Qwen2VLConfig(
        text_config=_text(tokenizer),
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2},
        tie_word_embeddings=True,
        **_ids(tokenizer),
    )
    processor = transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=_pixels(14)),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=_pixels(14)),
        chat_template=chat_template(_STYLE),
    )
    return Blueprint(config, processor)
