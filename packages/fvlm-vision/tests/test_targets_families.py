"""Every family under every combination of flags: where its towers lie is written by hand, a second time."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from fvlm_core.errors import ConfigError
from fvlm_core.testing import FAMILIES
from fvlm_core.testing.checkpoint import blueprint
from fvlm_vision.targets import select_targets

QWEN = ("model.visual.", ("model.visual.merger.", "model.visual.deepstack_merger_list."), "model.language_model.")
TOWER = ("model.vision_tower.", ("model.multi_modal_projector.",), "model.language_model.")
IDEFICS = ("model.vision_model.", ("model.connector.",), "model.text_model.")
PLACES = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "mllama": ("model.vision_model.", ("model.multi_modal_projector",), "model.language_model."),
    "pixtral": TOWER,
    "mistral3": TOWER,
    "gemma3": TOWER,
    "paligemma": TOWER,
    "llava_onevision": TOWER,
    "internvl": TOWER,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
}
"""Family → what the names of its vision tower, its projector and its language model start with."""
PARTS = {
    "attention": (".attn.", ".self_attn.", ".cross_attn.", ".attention."),
    "mlp": (".mlp.", ".feed_forward."),
}
FLAGS = ("vision", "language", "attention", "mlp", "projector")


def expected(family: str, names: list[str], flags: dict[str, bool]) -> set[str]:
    vision, projector, language = PLACES[family]
    found = set()
    for name in names:
        if name.startswith(projector):
            taken = flags["projector"]
        else:
            tower = "vision" if name.startswith(vision) else "language" if name.startswith(language) else None
            part = next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), None)
            taken = tower is not None and part is not None and flags[tower] and flags[part]
        if taken:
            found.add(name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_flag_combination(family):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(blueprint(family).config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    every = expected(family, names, dict.fromkeys(FLAGS, True))
    assert set(names) - every == {"lm_head"}  # nothing has been forgotten here
    for values in product([True, False], repeat=len(FLAGS)):
        flags = dict(zip(FLAGS, values, strict=True))
        chosen = expected(family, names, flags)
        towers = flags["vision"] or flags["language"]
        asks_for_nothing = flags["projector"] and family == "gemma3"  # its projector is a bare matrix, not a linear
        if not chosen or asks_for_nothing or (towers and not (flags["attention"] or flags["mlp"])):
            with pytest.raises(ConfigError):
                select_targets(model, **flags)
        else:
            assert set(select_targets(model, **flags).modules) == chosen, flags
