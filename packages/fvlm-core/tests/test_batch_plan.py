"""What is precomputed for a batch is what the model computes itself, and changes no logit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core.arch import facts_for
from fvlm_core.attention import use_varlen_attention
from fvlm_core.batch_plan import multimodal_positions
from fvlm_core.testing import tiny_checkpoint

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
MIXED = [[(112, 140)], [(56, 84), (112, 56)], []]  # images of each sample, (height, width)
UNIFORM = [[(112, 112)], [(112, 112)]]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    folder = tiny_checkpoint(request.param, tmp_path_factory.mktemp("zoo") / request.param)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def encode(processor, sizes):
    rng = np.random.default_rng(0)
    texts, images = [], []
    for number, sample in enumerate(sizes):
        blocks = [{"type": "image"} for _ in sample] + [{"type": "text", "text": "page " * (number + 1)}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": blocks}], tokenize=False))
        images.append([Image.fromarray(rng.integers(0, 255, (*size, 3), dtype="uint8")) for size in sample])
    return processor(text=texts, images=images, return_tensors="pt", padding=True)


@pytest.mark.parametrize("sizes", [MIXED, UNIFORM])
@torch.no_grad()
def test_plan_and_packed_attention_change_nothing(loaded, sizes):
    model, processor = loaded
    facts = facts_for(model)
    batch = encode(processor, sizes)
    stock = model(**batch).logits
    plan = facts.planner(model)(batch)
    position_ids, _ = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    torch.testing.assert_close(plan["position_ids"], position_ids, rtol=0, atol=0)
    torch.testing.assert_close(model(**batch, **plan).logits, stock, rtol=0, atol=0)
    tower = model.get_submodule(facts.vision[0])
    before = tower.config._attn_implementation
    use_varlen_attention(tower)
    try:
        torch.testing.assert_close(model(**batch, **plan).logits, stock, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(**batch).logits, stock, rtol=1e-6, atol=1e-6)
    finally:
        tower.config._attn_implementation = before


def test_a_wrong_plan_is_seen(loaded):
    """The comparison above can fail: a plan for other boundaries changes the logits."""
    model, processor = loaded
    batch = encode(processor, UNIFORM)
    plan = facts_for(model).planner(model)(batch)
    plan["position_ids"] = plan["position_ids"].flip(-1)
    with torch.no_grad():
        assert not torch.allclose(model(**batch, **plan).logits, model(**batch).logits, atol=1e-4)


def test_text_only_batches_need_no_plan(loaded):
    model, processor = loaded
    assert facts_for(model).planner(model)(processor(text=["one page"], return_tensors="pt")) == {}


def test_adjacent_media_and_padding():
    types = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    pieces = {1: [(1, 2, 4, 1), (1, 2, 2, 1)], 2: []}
    positions = multimodal_positions(types, mask, pieces, merge_size=2)
    assert positions[:, 0].tolist() == [[0, 0, 2, 3, 0], [0, 0, 2, 3, 0], [0, 1, 2, 3, 0]]
    assert positions[:, 1].tolist() == [[0, 0, 0, 1, 2]] * 3
