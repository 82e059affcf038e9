"""The tiny VLM before training: a Qwen2-VL of 3 million parameters, its tokenizer and its processor.

The classes are the real ones (``Qwen2VLForConditionalGeneration``, ``Qwen2VLProcessor``); only the sizes are small.
Every width that a linear layer reads or writes is a multiple of 64, one NF4 block, so the model loads in 4 bit as a big
one does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from words import TRAIN_WORDS

PATCH = 8
VOCAB_SIZE = 320  # 256 bytes and the tokens below, rounded up to a multiple of 64
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# A role with its line break is one token, so that a conversation costs few tokens. No text that the model reads or
# writes holds these: a transcribed word "user" has no line break after it.
_ROLES = ("system\n", "user\n", "assistant\n")
_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that sees one character at a time, so that text is transcribed character by character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(_SPECIAL) - len(_ROLES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAIN_WORDS, trainer)
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in _ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )


def make_processor() -> Qwen2VLProcessor:
    """Make the processor: 8-pixel patches, 2 × 2 of them to a token, images of up to 256 tokens kept as they are."""
    token = PATCH * 2
    size = {"shortest_edge": token * token, "longest_edge": 256 * token * token}
    pixels = {"patch_size": PATCH, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size), **pixels),
        tokenizer=make_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=dict(size), **pixels),
        chat_template=_CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Make the config: four layers of width 128 that look, four of width 192 that write."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 4,
        "embed_dim": 128,
        "hidden_size": 192,
        "num_heads": 2,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "initializer_range": 0.05,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=0.05,
    )


def write_untrained(folder: Path, seed: int) -> Path:
    """Write the untrained checkpoint (fp32 safetensors, config, tokenizer, processor) and return its folder."""
    processor = make_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(make_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
