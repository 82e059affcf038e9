"""Tiny Idefics3 and SmolVLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from fvlm_core.testing.blueprint import Blueprint
from fvlm_core.testing.chat import ChatStyle, chat_template
from fvlm_core.testing.tokenizer import VOCAB_SIZE, tiny_tokenizer

_TOKENS_AN_IMAGE = 4  # (32 / 8)² patches, shuffled two by two into one token each
_IMAGE: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
_CELLS = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]  # an image is cut into at most 2 × 2 crops


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    media = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    special = ("<|endoftext|>", "<|im_start|>", *media.values(), *_CELLS)
    return tiny_tokenizer(special, eos="<end_of_utterance>", pad="<|endoftext|>", named=media)


def _style(video: str | None) -> ChatStyle:
    names = {"system": "System", "user": "User", "assistant": "Assistant"}
    turns = {role: (f"{name}: ", "<end_of_utterance>") for role, name in names.items()}
    return ChatStyle(turns, image="<image>", video=video, begin="<|im_start|>", gap="\n")


def _config(kind: Callable[..., transformers.PretrainedConfig], tokenizer: Any) -> transformers.PretrainedConfig:
    return kind(
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        text_config={
            "model_type": "llama",
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
            "image_size": 32,
            "patch_size": 8,
        },
    )


def idefics3() -> Blueprint:
    """An overview and up to 2 × 2 crops an image, of four tokens each."""
    tokenizer = _tokenizer()
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(**_IMAGE),
        tokenizer=tokenizer,
        image_seq_len=_TOKENS_AN_IMAGE,
        chat_template=chat_template(_style(video=None)),
    )
    return Blueprint(_config(transformers.Idefics3Config, tokenizer), processor)


def smolvlm() -> Blueprint:
    """As Idefics3, with videos; its processor needs the package num2words."""
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    tokenizer = _tokenizer()
    processor = transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**_IMAGE),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(
            **_IMAGE, video_sampling={"video_size": {"longest_edge": 32}, "max_frames": 4, "fps": 1}
        ),
        image_seq_len=_TOKENS_AN_IMAGE,
        chat_template=chat_template(_style(video="<video>")),
    )
    return Blueprint(_config(transformers.SmolVLMConfig, tokenizer), processor)
