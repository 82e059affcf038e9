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


BOTH_PARTS = {"attention": True, "mlp": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_patterns_and_all_linear(family):
    """The same linears of the language model by their names and by a pattern; every linear, by the towers' flags."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(blueprint(family).config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    vision, projector, language = PLACES[family]
    asked = {name for name in names if name.startswith(language) and name.endswith((".q_proj", ".down_proj"))}
    assert any(name.endswith(".q_proj") for name in asked)
    assert any(name.endswith(".down_proj") for name in asked)
    alone = {**BOTH_PARTS, "vision": False, "language": True}
    for target in (["q_proj", "down_proj"], r".*\.(q|down)_proj"):
        assert set(select_targets(model, **alone, target_modules=target).modules) == asked, target
    for towers in ({"vision"}, {"language"}, {"vision", "language"}):
        flags = {**BOTH_PARTS, **{tower: tower in towers for tower in ("vision", "language")}}
        found = select_targets(model, **flags, target_modules="all-linear").modules
        starts = tuple(start for tower, start in (("vision", vision), ("language", language)) if tower in towers)
        assert set(found) == {name for name in names if name.startswith(starts) and not name.startswith(projector)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_of_each_tower(family):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(blueprint(family).config)
    flags = {**BOTH_PARTS, "vision": True, "language": True}
    whole, last = (set(select_targets(model, **flags, last_n_layers=count).modules) for count in (None, 1))
    vision, _, language = PLACES[family]
    for start in (vision, language):
        numbers = {name: [int(part) for part in name.split(".") if part.isdigit()] for name in whole}
        of_tower = {name: number[0] for name, number in numbers.items() if name.startswith(start) and number}
        taken = {name for name in last if name.startswith(start)}
        assert taken
        assert taken < set(of_tower)
        final = "global_transformer." if (family, start) == ("mllama", vision) else ""  # its second list runs last
        of_list = {name: number for name, number in of_tower.items() if final in name}
        assert taken == {name for name, number in of_list.items() if number == max(of_list.values())}
