"""Tiny Pixtral (LLaVA with a Pixtral tower) and Mistral 3."""

from __future__ import annotations

from typing import Any

import transformers

from fvlm_core.testing.blueprint import Blueprint
from fvlm_core.testing.chat import ChatStyle, chat_template
from fvlm_core.testing.tokenizer import VOCAB_SIZE, tiny_tokenizer, token_id

_SPECIAL = (
    "<s>",
    "</s>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)
_STYLE = ChatStyle(
    {
        "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "user": ("[INST]", "[/INST]"),
        "assistant": ("", "</s>"),
    },
    image="[IMG]",
    begin="<s>",
)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    return tiny_tokenizer(_SPECIAL, eos="</s>", pad="<pad>", bos="<s>")


def _text(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,  # 4 × 64 is not the width, as in the real models
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "sliding_window": None,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _vision(image_size: int, patch_size: int) -> dict[str, Any]:
    return {
        "model_type": "pixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": "silu",
    }


def _processor(tokenizer: Any, image_size: int, patch_size: int, merge: int) -> transformers.ProcessorMixin:
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": image_size}, patch_size={"height": patch_size, "width": patch_size}
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        spatial_merge_size=merge,
        chat_template=chat_template(_STYLE),
    )


def pixtral() -> Blueprint:
    """At most 4 × 4 patches an image, each a token."""
    tokenizer = _tokenizer()
    config = transformers.LlavaConfig(
        text_config=_text(tokenizer),
        vision_config=_vision(64, 16),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=token_id(tokenizer, "[IMG]"),
        image_seq_length=1,
    )
    return Blueprint(config, _processor(tokenizer, 64, 16, merge=1))


def mistral3() -> Blueprint:
    """At most 6 × 6 patches an image, merged two by two into tokens."""
    tokenizer = _tokenizer()
    config = transformers.Mistral3Config(
        text_config=_text(tokenizer),
        vision_config=_vision(84, 14),
        image_token_index=token_id(tokenizer, "[IMG]"),
        tie_word_embeddings=False,
    )
    return Blueprint(config, _processor(tokenizer, 84, 14, merge=2))
