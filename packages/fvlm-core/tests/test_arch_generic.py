"""Facts derived from the module tree: equal to the written ones, and right on models that nobody wrote any for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from fvlm_core.arch import TABLE, derive_facts, facts_for, linear_modules
from fvlm_core.testing import FAMILIES

GENERIC = [name for name in FAMILIES if name not in TABLE and name != "pixtral"]
# family → vision tower, projector, language tower, vision attention names, linears in the blocks of vision and language
EXPECTED = {
    "paligemma": ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "out_proj", 12, 14),
    "llava_onevision": (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model",
        "out_proj",
        12,
        14,
    ),
    "idefics3": ("model.vision_model", "model.connector", "model.text_model", "out_proj", 12, 14),
    "smolvlm": ("model.vision_model", "model.connector", "model.text_model", "out_proj", 12, 14),
    "internvl": (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model",
        "projection_layer",
        12,
        14,
    ),
}


def default_model(model_type):
    """A model of the type's default config, at full size, on the meta device."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in GENERIC])
def test_derived_facts_agree_with_the_written_ones(family, skeleton):
    model = skeleton(family)
    written, derived = facts_for(model), derive_facts(model)
    assert derived.generic
    assert linear_modules(model, derived) == linear_modules(model, written)
    for name in ("vision", "projector", "language", "audio", "lm_head", "layers", "unquantized"):
        assert getattr(derived, name) == getattr(written, name), name


@pytest.mark.parametrize("family", GENERIC)
def test_generic_families_by_hand(family, skeleton):
    model = skeleton(family)
    vision, projector, language, last, in_vision, in_language = EXPECTED[family]
    facts = facts_for(model)
    assert facts.generic
    assert (facts.vision, facts.projector, facts.language) == ((vision,), (projector,), (language,))
    assert facts.lm_head == "lm_head"
    assert facts.unquantized == (projector, "lm_head")
    linears = linear_modules(model, facts)
    assert {x.name for x in linears} == {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    attention = {x.name.rsplit(".", 1)[-1] for x in linears if (x.tower, x.part) == ("vision", "attention")}
    assert attention == {"q_proj", "k_proj", "v_proj", last}
    mlp = {x.name.rsplit(".", 1)[-1] for x in linears if (x.tower, x.part) == ("vision", "mlp")}
    assert mlp == {"fc1", "fc2"}
    for tower, count in (("vision", in_vision), ("language", in_language)):
        mine = [x for x in linears if x.tower == tower]
        assert len(mine) == count
        assert all(x.part != "other" and x.block in (0, 1) for x in mine)


def test_audio_is_found_and_kept_apart():
    model = default_model("qwen2_5_omni_thinker")
    facts = facts_for(model)
    nested = "visual" not in model._modules  # newer transformers hold the towers in a model without the head
    above, text = ("model.", "model.language_model") if nested else ("", "model")
    towers = (facts.vision, facts.audio, facts.language)
    assert towers == ((f"{above}visual",), (f"{above}audio_tower",), (text,))
    assert facts.projector == (f"{above}visual.merger",)
    assert facts.layers == {
        "vision": (f"{above}visual.blocks",),
        "language": (f"{text}.layers",),
        "audio": (f"{above}audio_tower.layers",),
    }
    towers = {x.tower for x in linear_modules(model, facts) if x.name.startswith(f"{above}audio_tower.")}
    assert towers == {"audio"}


def test_two_vision_towers_are_both_found():
    facts = facts_for(default_model("deepseek_vl_hybrid"))
    assert facts.vision == ("model.high_res_vision_model", "model.vision_model")
    assert facts.projector == ("model.high_res_vision_neck", "model.high_res_vision_proj", "model.aligner")


def test_a_head_inside_the_language_tower_is_the_head():
    model = default_model("kosmos-2")
    facts = facts_for(model)
    assert facts.lm_head == "text_model.lm_head"
    assert [x.name for x in linear_modules(model, facts) if x.tower == "head"] == ["text_model.lm_head"]


def test_what_must_not_be_quantized_is_not():
    """A patch embedding reads its own dtype, torch's attention its own weight, a router decides by small margins."""
    lfm2 = default_model("lfm2_vl")
    facts = facts_for(lfm2)
    assert {
        "model.vision_tower.embeddings.patch_embedding",
        "model.vision_tower.head.attention.out_proj",
        "model.multi_modal_projector",
        "lm_head",
    } <= set(facts.unquantized)
    inert = "model.vision_tower.head.attention.out_proj"
    assert isinstance(lfm2.get_submodule(inert), nn.Linear)
    assert inert not in {x.name for x in linear_modules(lfm2, facts)}

    llama4 = default_model("llama4")
    facts = facts_for(llama4)
    routers = {x.name for x in linear_modules(llama4, facts) if x.name.endswith("feed_forward.router")}
    assert len(routers) == llama4.config.text_config.num_hidden_layers
    assert routers <= set(facts.unquantized)
    assert {x.part for x in linear_modules(llama4, facts) if x.name in routers} == {"other"}


def test_other_llavas_take_the_generic_path():
    model = default_model("llava")  # with a CLIP tower
    facts = facts_for(model)
    assert facts.generic
    parts = {x.name.rsplit(".", 1)[-1]: x.part for x in linear_modules(model, facts) if x.tower == "vision"}
    assert parts["out_proj"] == "attention"
    assert parts["fc1"] == "mlp"


def test_a_model_without_a_vision_tower_has_none():
    facts = facts_for(default_model("fuyu"))
    assert facts.vision == ()
    assert facts.projector == ("model.vision_embed_tokens",)
