"""Tiny Llama 3.2 Vision."""

from __future__ import annotations

import transformers

from fvlm_core.testing.blueprint import Blueprint
from fvlm_core.testing.chat import ChatStyle, chat_template
from fvlm_core.testing.tokenizer import VOCAB_SIZE, tiny_tokenizer, token_id

_TILE = 28


def _style() -> ChatStyle:
    turns = {
        role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
        for role in ("system", "user", "assistant")
    }
    return ChatStyle(turns, image="<|image|>", begin="<|begin_of_text|>")


def mllama() -> Blueprint:
    """Four text layers (the second and the last attend to the image), three local and two global vision layers.

    As in the real model, the image token has an embedding but no row in the head, so it can never be a label.
    """
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        "<|python_tag|>",
    )
    tokenizer = tiny_tokenizer(
        special,
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        beyond=("<|image|>",),
    )
    config = transformers.MllamaConfig(
        image_token_index=token_id(tokenizer, "<|image|>"),
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": _TILE,
            "patch_size": 14,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 192,  # the last layer and the two intermediate ones
        },
    )
    processor = transformers.MllamaProcessor(
        image_processor=transformers.MllamaImageProcessor(size={"height": _TILE, "width": _TILE}, max_image_tiles=4),
        tokenizer=tokenizer,
        chat_template=chat_template(_style()),
    )
    return Blueprint(config, processor)
