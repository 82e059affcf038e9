"""Written facts against the module trees of the installed transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fvlm_core.arch import TABLE, check_facts, facts_by_type, facts_for, linear_modules
from fvlm_core.arch.facts import MediaTokens
from fvlm_core.errors import CheckpointError
from fvlm_core.testing import FAMILIES

WRITTEN = {"pixtral": "llava"} | {name: name for name in TABLE if name != "llava"}  # tiny checkpoint → model type
TEXT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TEXT_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def blocks(path, count, endings, tower, part, first=0):
    return {(f"{path}.{i}.{end}", tower, part, first + i) for i in range(count) for end in endings}


def classified(model):
    return {(x.name, x.tower, x.part, x.block) for x in linear_modules(model, facts_for(model))}


def test_every_written_family_has_a_tiny_checkpoint():
    assert set(WRITTEN.values()) == set(TABLE)
    assert set(WRITTEN) <= set(FAMILIES)
    assert all(facts.model_type == model_type for model_type, facts in TABLE.items())


@pytest.mark.parametrize("family", WRITTEN)
def test_facts_hold_for_the_real_module_tree(family, skeleton):
    model = skeleton(family)
    facts = facts_for(model)
    assert facts is TABLE[WRITTEN[family]]
    assert not facts.generic
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = linear_modules(model, facts)
    assert {linear.name for linear in found} == linears
    for linear in found:  # inside the blocks nothing is left unclear, outside them nothing is taken
        inside = linear.tower in ("vision", "language")
        assert (linear.part in ("attention", "mlp")) == inside, linear
        assert (linear.block is not None) == inside, linear
        assert linear.parameters == sum(p.numel() for p in model.get_submodule(linear.name).parameters())


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize("entry", ["vision", "projector", "language", "attention", "mlp", "unquantized", "layers"])
def test_a_renamed_entry_is_an_error(family, entry, skeleton):
    model = skeleton(family)
    facts = facts_for(model)
    value = {"language": ("gone",)} if entry == "layers" else (*getattr(facts, entry), "gone")
    with pytest.raises(CheckpointError, match="'gone'"):
        check_facts(model, replace(facts, **{entry: value}))


def test_other_entries_are_checked_too(skeleton):
    model = skeleton("gemma3")
    facts = facts_for(model)
    with pytest.raises(CheckpointError, match="'gone'"):
        check_facts(model, replace(facts, lm_head="gone"))
    with pytest.raises(CheckpointError, match="'gone_id'"):
        check_facts(model, replace(facts, media=MediaTokens(image=("gone_id",))))
    with pytest.raises(CheckpointError, match=r"'model\.vision_tower.*in no tower"):
        linear_modules(model, replace(facts, vision=()))


def test_a_model_without_its_head_is_refused(skeleton):
    with pytest.raises(CheckpointError, match=r"'model\.visual'.*head"):
        facts_for(skeleton("qwen2_vl").model)


def test_llava_is_known_by_its_tower():
    assert facts_by_type("llava") is None
    assert facts_by_type("llava", "clip_vision_model") is None
    assert facts_by_type("llava", "pixtral") is TABLE["llava"]
    assert facts_by_type("qwen2_vl") is TABLE["qwen2_vl"]
    assert facts_by_type("qwen2_vl", "qwen2_vl_vision") is TABLE["qwen2_vl"]
    assert facts_by_type("qwen") is None


def test_qwen2_vl_by_hand(skeleton):
    visual, text = "model.visual.blocks", "model.language_model.layers"
    assert classified(skeleton("qwen2_vl")) == (
        blocks(visual, 2, ("attn.qkv", "attn.proj"), "vision", "attention")
        | blocks(visual, 2, ("mlp.fc1", "mlp.fc2"), "vision", "mlp")
        | blocks(text, 2, TEXT_ATTENTION, "language", "attention")
        | blocks(text, 2, TEXT_MLP, "language", "mlp")
        | {(f"model.visual.merger.mlp.{i}", "projector", "other", None) for i in (0, 2)}
        | {("lm_head", "head", "other", None)}
    )


def test_mllama_by_hand(skeleton):
    """Cross-attention belongs to language, global layers to vision, after the local ones."""
    local, whole = "model.vision_model.transformer.layers", "model.vision_model.global_transformer.layers"
    text = "model.language_model.layers"
    cross = {
        (f"{text}.{i}.cross_attn.{end}_proj", "language", "attention", i)
        for i in (1, 3)
        for end in ("q", "k", "v", "o")
    }
    own = {(f"{text}.{i}.{end}", "language", "attention", i) for i in (0, 2) for end in TEXT_ATTENTION}
    assert classified(skeleton("mllama")) == (
        blocks(local, 3, TEXT_ATTENTION, "vision", "attention")
        | blocks(local, 3, ("mlp.fc1", "mlp.fc2"), "vision", "mlp")
        | blocks(whole, 2, TEXT_ATTENTION, "vision", "attention", first=3)
        | blocks(whole, 2, ("mlp.fc1", "mlp.fc2"), "vision", "mlp", first=3)
        | cross
        | own
        | blocks(text, 4, TEXT_MLP, "language", "mlp")
        | {("model.multi_modal_projector", "projector", "other", None), ("lm_head", "head", "other", None)}
    )


# vision attention, vision MLP, projector, language attention, language MLP, counted by hand from the tiny configs
COUNTS = {
    "qwen2_5_vl": (4 * 2, 4 * 3, 2, 2 * 4, 2 * 3),
    "qwen3_vl": (3 * 2, 3 * 2, 2 + 2 * 2, 3 * 4, 3 * 3),  # one merger, two of deepstack
    "pixtral": (2 * 4, 2 * 3, 2, 2 * 4, 2 * 3),
    "mistral3": (2 * 4, 2 * 3, 3, 2 * 4, 2 * 3),
    "gemma3": (2 * 4, 2 * 2, 0, 3 * 4, 3 * 3),  # the projector is a bare matrix
}


@pytest.mark.parametrize("family", COUNTS)
def test_counts_by_hand(family, skeleton):
    count = Counter((x.tower, x.part) for x in linear_modules(skeleton(family), TABLE[WRITTEN[family]]))
    keys = [("vision", "attention"), ("vision", "mlp"), ("projector", "other")]
    keys += [("language", "attention"), ("language", "mlp")]
    assert tuple(count[key] for key in keys) == COUNTS[family]
    assert count["head", "other"] == 1
    assert sum(count.values()) == sum(COUNTS[family]) + 1
