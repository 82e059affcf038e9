"""Tiny models on a SigLIP tower: Gemma 3, PaliGemma and LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

import transformers

from fvlm_core.testing.blueprint import Blueprint
from fvlm_core.testing.chat import ChatStyle, chat_template, chatml
from fvlm_core.testing.tokenizer import VOCAB_SIZE, tiny_tokenizer

_PATCHES = 16  # 4 × 4 patches of 8 × 8 pixels an image
_SIZE = {"height": 32, "width": 32}
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}


def _text(tokenizer: transformers.PreTrainedTokenizerFast, **extra: Any) -> dict[str, Any]:
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **extra,
    }


def gemma3() -> Blueprint:
    """Three text layers, two of which see only the last 16 tokens; four tokens an image."""
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = tiny_tokenizer((*special, *named.values()), eos="<end_of_turn>", pad="<pad>", bos="<bos>", named=named)
    names = {"system": "user", "user": "user", "assistant": "model"}  # Gemma has no system turn
    style = ChatStyle(
        {role: (f"<start_of_turn>{name}\n", "<end_of_turn>") for role, name in names.items()},
        image="<start_of_image>",
        begin="<bos>",
        gap="\n",
    )
    config = transformers.Gemma3Config(
        text_config=_text(
            tokenizer,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            sliding_window=16,
            head_dim=64,
            query_pre_attn_scalar=64,
        ),
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size=_SIZE),
        tokenizer=tokenizer,
        chat_template=chat_template(style),
        image_seq_length=4,
    )
    return Blueprint(config, processor)


def paligemma() -> Blueprint:
    """A prefix language model: image and prompt are seen both ways, the answer is not."""
    tokenizer = tiny_tokenizer(
        ("<pad>", "<eos>", "<bos>", "<image>"),
        eos="<eos>",
        pad="<pad>",
        bos="<bos>",
        named={"image_token": "<image>"},
    )
    # A made-up template (the real model has none): the image, the prompt, a line feed, the answer.
    style = ChatStyle({"system": ("", "\n"), "user": ("", "\n"), "assistant": ("", "<eos>")}, image="<image>")
    processor = transformers.PaliGemmaProcessor(
        image_processor=transformers.SiglipImageProcessor(size=_SIZE, image_seq_length=_PATCHES),
        tokenizer=tokenizer,
        chat_template=chat_template(style),
    )
    vocab_size = -(-len(tokenizer) // 64) * 64  # the processor has just added its location and segmentation tokens
    config = transformers.PaliGemmaConfig(
        text_config=_text(tokenizer, model_type="gemma", head_dim=64, num_key_value_heads=1, vocab_size=vocab_size),
        vision_config=_VISION,
        projection_dim=128,
        hidden_size=128,
        vocab_size=vocab_size,
        image_token_index=tokenizer.image_token_id,
    )
    return Blueprint(config, processor)


def llava_onevision() -> Blueprint:
    """An overview and up to two crops an image, of 16 tokens each."""
    named = {"image_token": "<image>", "video_token": "<video>"}
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values())
    tokenizer = tiny_tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>", named=named)
    grids = [[32, 32], [32, 64], [64, 32]]
    config = transformers.LlavaOnevisionConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=_VISION,
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grids,
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=_SIZE, image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=_SIZE),
        num_image_tokens=_PATCHES,
        vision_feature_select_strategy="full",
        chat_template=chat_template(chatml("<image>", "<video>")),
    )
    return Blueprint(config, processor)
