"""What a choice of towers, parts, names and depth selects; every expectation is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from fvlm_core.errors import ConfigError
from fvlm_core.testing.checkpoint import blueprint
from fvlm_vision.targets import select_targets

ALL = {"vision": True, "language": True, "attention": True, "mlp": True}
QWEN = {
    ("vision", "attention"): [
        "model.visual.blocks.0.attn.qkv",
        "model.visual.blocks.0.attn.proj",
        "model.visual.blocks.1.attn.qkv",
        "model.visual.blocks.1.attn.proj",
    ],
    ("vision", "mlp"): [
        "model.visual.blocks.0.mlp.fc1",
        "model.visual.blocks.0.mlp.fc2",
        "model.visual.blocks.1.mlp.fc1",
        "model.visual.blocks.1.mlp.fc2",
    ],
    ("language", "attention"): [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.k_proj",
        "model.language_model.layers.0.self_attn.v_proj",
        "model.language_model.layers.0.self_attn.o_proj",
        "model.language_model.layers.1.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.k_proj",
        "model.language_model.layers.1.self_attn.v_proj",
        "model.language_model.layers.1.self_attn.o_proj",
    ],
    ("language", "mlp"): [
        "model.language_model.layers.0.mlp.gate_proj",
        "model.language_model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp.down_proj",
        "model.language_model.layers.1.mlp.gate_proj",
        "model.language_model.layers.1.mlp.up_proj",
        "model.language_model.layers.1.mlp.down_proj",
    ],
}
MERGER = ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"]


@pytest.fixture(scope="module")
def skeleton() -> Callable[[str], Any]:
    """Family → its tiny model on the meta device; do not change it."""

    @cache
    def build(family: str) -> Any:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(blueprint(family).config)

    return build


def chosen(model, **changes):
    return set(select_targets(model, **{**ALL, **changes}).modules)


@pytest.mark.parametrize(
    ("vision", "language", "attention", "mlp", "projector"), list(product([True, False], repeat=5))
)
def test_every_flag_combination_on_qwen2_vl(vision, language, attention, mlp, projector, skeleton):
    flags = {"vision": vision, "language": language, "attention": attention, "mlp": mlp, "projector": projector}
    towers = [name for name in ("vision", "language") if flags[name]]
    parts = [name for name in ("attention", "mlp") if flags[name]]
    if (towers and not parts) or not (towers or projector):
        with pytest.raises(ConfigError, match="=False leave"):
            select_targets(skeleton("qwen2_vl"), **flags)
        return
    expected = {name for tower in towers for part in parts for name in QWEN[tower, part]}
    expected |= set(MERGER) if projector else set()
    assert set(select_targets(skeleton("qwen2_vl"), **flags).modules) == expected


def test_modules_are_in_tree_order_and_once(skeleton):
    model = skeleton("qwen2_vl")
    modules = select_targets(model, **ALL, target_modules=["down_proj", "qkv", "blocks.0.attn.qkv"]).modules
    assert list(modules) == [
        "model.visual.blocks.0.attn.qkv",
        "model.visual.blocks.1.attn.qkv",
        "model.language_model.layers.0.mlp.down_proj",
        "model.language_model.layers.1.mlp.down_proj",
    ]


def test_mllama_cross_attention_is_language_and_global_layers_are_vision(skeleton):
    model = skeleton("mllama")
    text, vision = "model.language_model.layers", "model.vision_model"
    letters = ("q", "k", "v", "o")
    assert chosen(model, vision=False, mlp=False) == {
        f"{text}.{i}.{kind}.{letter}_proj"
        for i, kind in ((0, "self_attn"), (1, "cross_attn"), (2, "self_attn"), (3, "cross_attn"))
        for letter in letters
    }
    assert chosen(model, language=False, attention=False) == {
        *(f"{vision}.transformer.layers.{i}.mlp.fc{n}" for i in range(3) for n in (1, 2)),
        *(f"{vision}.global_transformer.layers.{i}.mlp.fc{n}" for i in range(2) for n in (1, 2)),
    }
    assert chosen(model, projector=True) - chosen(model) == {"model.multi_modal_projector"}


def test_generic_family(skeleton):
    model = skeleton("internvl")
    tower = "model.vision_tower.encoder.layer"
    names = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer")
    assert chosen(model, language=False, mlp=False) == {f"{tower}.{i}.{name}" for i in range(2) for name in names}
    assert chosen(model, vision=False, attention=False) == {
        f"model.language_model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")
    }


def test_audio_is_never_selected():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen2_5_omni_thinker"))
    for choice in (None, "all-linear", ".*", ["q_proj", "fc1"]):
        if choice == ["q_proj", "fc1"]:  # fc1 is there in the audio tower alone
            with pytest.raises(ConfigError, match=r"'fc1' matches only audio modules, which are never trained"):
                select_targets(model, **ALL, target_modules=choice)
            continue
        modules = select_targets(model, **ALL, target_modules=choice).modules
        assert modules
        assert not [name for name in modules if name.startswith("audio_tower")]


class TestNames:
    def test_a_list_is_bound_by_the_towers_and_not_by_the_parts(self, skeleton):
        model = skeleton("mllama")
        text = {f"model.language_model.layers.{i}.mlp.down_proj" for i in range(4)}
        text |= {
            f"model.language_model.layers.{i}.{kind}.q_proj"
            for i, kind in enumerate(("self_attn", "cross_attn", "self_attn", "cross_attn"))
        }
        names = ["q_proj", "down_proj"]
        assert chosen(model, vision=False, mlp=False, target_modules=names) == text
        both = chosen(model, attention=False, mlp=False, target_modules=names)
        assert both - text == {
            *(f"model.vision_model.transformer.layers.{i}.self_attn.q_proj" for i in range(3)),
            *(f"model.vision_model.global_transformer.layers.{i}.self_attn.q_proj" for i in range(2)),
        }

    def test_whole_components_only(self, skeleton):
        names = [*QWEN["vision", "attention"][1::2]]
        assert chosen(skeleton("qwen2_vl"), target_modules=["proj"]) == set(names)  # and no q_proj

    def test_full_names(self, skeleton):
        name = "model.language_model.layers.1.mlp.up_proj"
        assert chosen(skeleton("qwen2_vl"), target_modules=[name]) == {name}

    def test_head_and_projector_when_named(self, skeleton):
        model = skeleton("qwen2_vl")
        assert chosen(model, target_modules=["lm_head", "merger.mlp.0", "mlp.2"]) == {"lm_head", *MERGER}
        assert chosen(model, vision=False, language=False, target_modules=["lm_head"]) == {"lm_head"}

    def test_a_common_name_does_not_name_the_projector(self, skeleton):
        """linear_fc1 is a name in Qwen3-VL's blocks and in its mergers."""
        model = skeleton("qwen3_vl")
        blocks = {f"model.visual.blocks.{i}.mlp.linear_fc1" for i in range(3)}
        mergers = {"model.visual.merger.linear_fc1"}
        mergers |= {f"model.visual.deepstack_merger_list.{i}.linear_fc1" for i in range(2)}
        assert chosen(model, target_modules=["linear_fc1"]) == blocks
        assert chosen(model, projector=True, target_modules=["linear_fc1"]) == blocks | mergers
        assert chosen(model, target_modules=["merger.linear_fc1"]) == {"model.visual.merger.linear_fc1"}

    def test_regex(self, skeleton):
        model = skeleton("qwen2_vl")
        assert chosen(model, target_modules=r".*\.layers\.1\..*up_proj") == {
            "model.language_model.layers.1.mlp.up_proj"
        }
        everything = {name for names in QWEN.values() for name in names}
        assert chosen(model, target_modules=".*") == everything  # says neither head nor projector by name
        assert chosen(model, target_modules=r".*|lm_head") == {*everything, "lm_head"}
        assert chosen(model, target_modules=r".*\.merger\..*") == set(MERGER)
        assert chosen(model, vision=False, target_modules=".*") == {
            *QWEN["language", "attention"],
            *QWEN["language", "mlp"],
        }
        with pytest.raises(ConfigError, match="'q_pro' matches no linear layer"):
            select_targets(model, **ALL, target_modules="q_pro")  # a part of a name is no match

    def test_all_linear(self, skeleton):
        model = skeleton("qwen2_vl")
        everything = {name for names in QWEN.values() for name in names}
        off = {"attention": False, "mlp": False}
        assert chosen(model, **off, target_modules="all-linear") == everything
        assert chosen(model, **off, projector=True, target_modules="All-Linear") == everything | set(MERGER)
        assert chosen(model, language=False, target_modules="all-linear") == {
            *QWEN["vision", "attention"],
            *QWEN["vision", "mlp"],
        }

    def test_all_linear_takes_what_lies_outside_the_blocks(self):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("lfm2_vl"))
        patches = "model.vision_tower.embeddings.patch_embedding"
        assert patches in chosen(model, target_modules="all-linear")
        assert patches not in chosen(model)


class TestDepth:
    def test_last_blocks_of_each_tower(self, skeleton):
        model = skeleton("qwen2_vl")
        last = {name for names in QWEN.values() for name in names if ".1." in name}
        assert chosen(model, last_n_layers=1) == last
        assert chosen(model, last_n_layers=1, projector=True) == last | set(MERGER)
        assert chosen(model, last_n_layers=2) == chosen(model)

    def test_towers_of_different_depth(self, skeleton):
        """mllama's tower runs its three local layers first, then its two global ones; the text has four layers."""
        model = skeleton("mllama")
        modules = chosen(model, attention=False, last_n_layers=3)
        vision = "model.vision_model"
        assert {name for name in modules if name.startswith(vision)} == {
            *(f"{vision}.transformer.layers.2.mlp.fc{n}" for n in (1, 2)),
            *(f"{vision}.global_transformer.layers.{i}.mlp.fc{n}" for i in range(2) for n in (1, 2)),
        }
        text = {name for name in modules if not name.startswith(vision)}
        assert text == {
            f"model.language_model.layers.{i}.mlp.{n}_proj" for i in (1, 2, 3) for n in ("gate", "up", "down")
        }
        assert len(chosen(model, attention=False, last_n_layers=5)) == 5 * 2 + 4 * 3  # more than the text has is all

    def test_it_also_binds_names(self, skeleton):
        assert chosen(skeleton("qwen2_vl"), last_n_layers=1, target_modules=["qkv", "lm_head"]) == {
            "model.visual.blocks.1.attn.qkv",
            "lm_head",
        }


def test_table(skeleton):
    selection = select_targets(skeleton("qwen2_vl"), **{**ALL, "mlp": False}, projector=True)
    rows = {(row.tower, row.part): (row.modules, row.of, row.parameters) for row in selection.table.rows}
    qkv, proj = 64 * 192 + 192, 64 * 64 + 64
    query, key, out = 128 * 128 + 128, 128 * 64 + 64, 128 * 128
    assert rows == {
        ("vision", "attention"): (4, 4, 2 * (qkv + proj)),
        ("vision", "mlp"): (0, 4, 0),
        ("projector", "other"): (2, 2, 256 * 256 + 256 + 256 * 128 + 128),
        ("language", "attention"): (8, 8, 2 * (query + 2 * key + out)),
        ("language", "mlp"): (0, 6, 0),
        ("head", "other"): (0, 1, 0),
    }
    text = str(selection)
    assert text == str(selection.table)
    assert "language   attention    8 of 8      98,816" in text
    assert text.splitlines()[-1].split() == ["total", "14", "of", "25", f"{sum(v[2] for v in rows.values()):,}"]


def test_peft_wraps_exactly_the_selection():
    model = AutoModelForImageTextToText.from_config(blueprint("qwen3_vl").config)
    selection = select_targets(model, **{**ALL, "language": False}, projector=False, last_n_layers=1)
    adapted = get_peft_model(model, LoraConfig(target_modules=list(selection.modules), r=2))
    prefix = "base_model.model."
    wrapped = {
        name.removeprefix(prefix).removesuffix(".lora_A")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A")
    }
    assert wrapped == set(selection.modules)
    assert select_targets(adapted, **{**ALL, "language": False}, last_n_layers=1) == selection  # seen through PEFT
