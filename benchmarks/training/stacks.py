"""The stacks that are compared: each loads a checkpoint in 4 bit, puts the same LoRA on it, and brings a collator."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

RANK, ALPHA = 16, 32
Stack = tuple[Any, Any, Callable[[list[dict[str, Any]]], dict[str, Any]]]
"""A model with adapters, its processor, and a collator."""


def fvlm(folder: str, mode: bool | str) -> Stack:
    """This project."""
    from fvlm_vision import FastVisionDataCollator, FastVisionModel

    model, processor = FastVisionModel.from_pretrained(folder, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=mode)
    return model, processor, FastVisionDataCollator(model, processor)


def hf(folder: str, mode: bool | str) -> Stack:
    """Plain transformers, PEFT and bitsandbytes."""
    from benchmarks.training.targets import choose
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    choice = choose(folder)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=choice.unquantized,
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": 0} if torch.cuda.is_available() else None,
        attn_implementation="sdpa",
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=bool(mode), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=choice.targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    processor = AutoProcessor.from_pretrained(folder)
    return model, processor, _plain_collator(model, processor)


def liger(folder: str, mode: bool | str) -> Stack:
    """Plain transformers with Liger's kernels."""
    import liger_kernel.transformers as kernels
    from transformers import AutoConfig

    family = AutoConfig.from_pretrained(folder).model_type
    getattr(kernels, f"apply_liger_kernel_to_{family}")()
    return hf(folder, mode)


def unsloth(folder: str, mode: bool | str) -> Stack:
    """Unsloth, told not to shrink images."""
    from unsloth import FastVisionModel
    from unsloth.trainer import UnslothVisionDataCollator

    model, processor = FastVisionModel.from_pretrained(folder, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=mode)
    FastVisionModel.for_training(model)
    return model, processor, UnslothVisionDataCollator(model, processor, resize="max")


STACKS: dict[str, Callable[[str, bool | str], Stack]] = {"fvlm": fvlm, "hf": hf, "liger": liger, "unsloth": unsloth}


def installed() -> list[str]:
    """Return the names of the stacks whose packages are there."""
    needed = {"fvlm": "fvlm_vision", "hf": "peft", "liger": "liger_kernel", "unsloth": "unsloth"}
    return [stack for stack in STACKS if find_spec(needed[stack]) is not None]


def _plain_collator(model: Any, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    from fvlm_core.arch import facts_for, media_token_ids

    media = torch.tensor(sorted(media_token_ids(facts_for(model), model.config, processor).all))
    bos = processor.tokenizer.bos_token

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [processor.apply_chat_template(sample["messages"], tokenize=False) for sample in batch]
        images = [[sample["messages"][0]["content"][0]["image"]] for sample in batch]
        # A template that writes the first token itself wants no other before it.
        plain = {} if bos is None or not texts[0].startswith(bos) else {"add_special_tokens": False}
        made = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right", **plain)
        encoded = {name: value for name, value in made.items() if name != "labels"}
        hidden = (encoded["attention_mask"] == 0) | torch.isin(encoded["input_ids"], media)
        return {**encoded, "labels": encoded["input_ids"].masked_fill(hidden, -100)}

    return collate
