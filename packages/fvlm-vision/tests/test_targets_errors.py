"""Choices of LoRA targets that cannot be meant get one sentence: the value, what the model has, what to do."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from fvlm_core.errors import ConfigError
from fvlm_core.testing.checkpoint import blueprint
from fvlm_vision.targets import select_targets

ALL = {"vision": True, "language": True, "attention": True, "mlp": True}


@cache
def skeleton(family: str) -> Any:
    """A family's tiny model on the meta device; do not change it."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(blueprint(family).config)


BAD = {
    "towers": (
        {"vision": False, "language": False},
        r"finetune_vision_layers=False and finetune_language_layers=False",
    ),
    "parts": ({"attention": False, "mlp": False}, r"finetune_attention_modules=False and finetune_mlp_modules=False"),
    "no bool": ({"vision": 1}, r"finetune_vision_layers=1 is not a boolean: pass True or False"),
    "no such name": ({"target_modules": ["qkv", "c_attn"]}, r"'c_attn' matches no linear.*qkv"),
    "other tower": ({"vision": False, "target_modules": ["qkv"]}, r"'qkv' matches only vision.*finetune_vision_layers"),
    "no regex": ({"target_modules": "(qkv"}, r"'\(qkv' is not a regular expression"),
    "empty": ({"target_modules": []}, r"target_modules=\[\] selects nothing"),
    "no list": ({"target_modules": 3}, r"target_modules=3 is not a choice"),
    "all-linear of nothing": (
        {"vision": False, "language": False, "target_modules": "all-linear"},
        r"'all-linear' selects nothing.*finetune_vision_layers",
    ),
    "no depth": ({"last_n_layers": 0}, r"finetune_last_n_layers=0"),
    "depth is True": ({"last_n_layers": True}, r"finetune_last_n_layers=True"),
    "too deep": ({"last_n_layers": 3}, r"finetune_last_n_layers=3.*vision has 2 and language has 2"),
    "names above the depth": (
        {"last_n_layers": 1, "target_modules": ["layers.0.mlp.up_proj"]},
        r"finetune_last_n_layers=1 leaves nothing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_choices_are_one_sentence(case):
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        select_targets(skeleton("qwen2_vl"), **{**ALL, **changes})
    assert "\n" not in str(caught.value)


def test_a_tower_that_selects_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"finetune_projector_layers=True selects nothing.*'gemma3'"):
        select_targets(skeleton("gemma3"), **ALL, projector=True)  # its projector is a bare matrix
    with torch.device("meta"):
        fuyu = AutoModelForImageTextToText.from_config(AutoConfig.for_model("fuyu"))
    with pytest.raises(ConfigError, match="finetune_vision_layers=True selects nothing"):
        select_targets(fuyu, **ALL)
    assert select_targets(fuyu, **{**ALL, "vision": False}).modules
