"""Tiny InternVL."""

from __future__ import annotations

import transformers

from fvlm_core.testing.blueprint import Blueprint
from fvlm_core.testing.chat import chat_template, chatml
from fvlm_core.testing.tokenizer import VOCAB_SIZE, tiny_tokenizer

_SIZE = {"height": 32, "width": 32}


def internvl() -> Blueprint:
    """An overview and up to two crops an image, of four tokens each."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values())
    tokenizer = tiny_tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>", named=named)
    config = transformers.InternVLConfig(
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        text_config={
            "model_type": "qwen2",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 8192,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_bias": True,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
    )
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=_SIZE, crop_to_patches=True, max_patches=2),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size=_SIZE),
        image_seq_length=4,
        chat_template=chat_template(chatml("<IMG_CONTEXT>\n", "<video>\n")),
    )
    return Blueprint(config, processor)
