"""The walk over the linears sees through PEFT and bitsandbytes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from fvlm_core.arch import facts_for, linear_modules, plain_modules


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "idefics3"])
def test_peft_changes_nothing(family, tiny):
    plain = AutoModelForImageTextToText.from_pretrained(tiny(family))
    before = linear_modules(plain, facts_for(plain))
    names = [name for name, _ in plain.named_modules()]
    config = LoraConfig(target_modules=["q_proj", "fc1", "down_proj"], modules_to_save=["lm_head"], r=4)
    adapted = get_peft_model(plain, config)
    assert any("lora_A" in name for name, _ in adapted.named_modules())
    assert facts_for(adapted).model_type == plain.config.model_type
    assert linear_modules(adapted, facts_for(adapted)) == before
    assert linear_modules(plain, facts_for(plain)) == before  # the inner model, whose layers are wrapped
    assert [name for name, _ in plain_modules(adapted)] == names


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_are_linears_of_their_full_size(bits, tiny):
    full = AutoModelForImageTextToText.from_pretrained(tiny("qwen2_vl"))
    facts = facts_for(full)
    if bits == 4:
        options = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(facts.unquantized))
        kind: type[torch.nn.Module] = bnb.nn.Linear4bit
    else:
        options = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(facts.unquantized))
        kind = bnb.nn.Linear8bitLt
    model = AutoModelForImageTextToText.from_pretrained(tiny("qwen2_vl"), quantization_config=options)
    assert linear_modules(model, facts_for(model)) == linear_modules(full, facts)
    quantized = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert quantized == {x.name for x in linear_modules(full, facts) if x.tower in ("vision", "language")}
