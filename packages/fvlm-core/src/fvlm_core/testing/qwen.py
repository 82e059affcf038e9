"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from fvlm_core.testing.blueprint import Blueprint
from fvlm_core.testing.chat import chat_template, chatml
from fvlm_core.testing.tokenizer import VOCAB_SIZE, tiny_tokenizer, token_id

_TEMPLATE = chat_template(
    chatml("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
)
_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped, and k_proj still 64 wide
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
}


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_TOKENS.values())
    return tiny_tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>", named=_TOKENS)


def _ids(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{name}_id": token_id(tokenizer, token) for name, token in _TOKENS.items()}


def _text(tokenizer: transformers.PreTrainedTokenizerFast, mrope_section: list[int], **extra: Any) -> dict[str, Any]:
    """Return the text config; ``mrope_section`` must sum to half the head size."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**_TEXT, **ids, "rope_parameters": rope, **extra}


def _pixels(patch: int, frames: int = 1) -> dict[str, int]:
    """From 2 × 2 to 4 × 4 merged patches an image: few enough tokens for a quick test, still of many shapes."""
    merged = (2 * patch) ** 2
    return {"shortest_edge": 4 * merged * frames, "longest_edge": 16 * merged * frames}


def _qwen2_processor(kind: type[transformers.ProcessorMixin], tokenizer: Any) -> transformers.ProcessorMixin:
    return kind(
        image_processor=transformers.Qwen2VLImageProcessor(size=_pixels(14)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=_pixels(14)),
        chat_template=_TEMPLATE,
    )


def qwen2_vl() -> Blueprint:
    """Two text layers, two vision blocks, tied embeddings as in the 2B model."""
    tokenizer = _tokenizer()
    config = transformers.Qwen2VLConfig(
        text_config=_text(tokenizer, [4, 6, 6]),
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2},
        tie_word_embeddings=True,
        **_ids(tokenizer),
    )
    return Blueprint(config, _qwen2_processor(transformers.Qwen2VLProcessor, tokenizer))


def qwen2_5_vl() -> Blueprint:
    """Four vision blocks: two attend within windows of 2 × 2 merged patches, two over the whole image."""
    tokenizer = _tokenizer()
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, [4, 6, 6]),
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
        },
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    return Blueprint(config, _qwen2_processor(transformers.Qwen2_5_VLProcessor, tokenizer))


def qwen3_vl() -> Blueprint:
    """Three vision blocks, the first two of which feed the first two text layers (deepstack).

    The third text layer carries what they brought from the image's positions to the text's, and so to the loss. The
    heads are wider than the hidden state.
    """
    tokenizer = _tokenizer()
    config = transformers.Qwen3VLConfig(
        text_config=_text(tokenizer, [12, 10, 10], head_dim=64, num_hidden_layers=3),
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=_pixels(16), patch_size=16, **half),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(size=_pixels(16, frames=4), patch_size=16, **half),
        chat_template=_TEMPLATE,
    )
    return Blueprint(config, processor)
