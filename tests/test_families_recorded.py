"""Every family in every precision under "auto": layers run as recordings that keep what they compute, as stock."""

from __future__ import annotations

import pytest
import torch
from matrix_tools import LOADING, assert_same, gradients, ours, plain, same_start, sample, stock
from transformers import AutoModelForImageTextToText

from fvlm_core.checkpointing import apply_checkpointing, graphs_of, use_graphs
from fvlm_core.fused import fuse_model, unfuse_model
from fvlm_core.graphs import LayerGraphs
from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_vision import FastVisionDataCollator, FastVisionModel

RECORDED = {"4bit", "16bit"}
"""The others, 8-bit layers and layers trained whole, run as they are."""
NO_GRADIENT = 1e-8
"""Norm of a gradient that is rounding alone: a bias of all keys (Gemma 3's vision tower) changes no attention."""
SAMPLES = (sample(1, images=2), sample(5, answer="one stamp"))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A family's tiny checkpoint in fp32."""
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("families") / request.param)


def both(folder, precision, **options):
    """FVLM's model, not yet fused, and stock's with the same values; and the processor."""
    if precision == "full":
        model, processor = FastVisionModel.from_pretrained(folder, full_finetuning=True)
        FastVisionModel.for_training(model)
        return model, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train(), processor
    model, processor = ours(folder, precision, **options)
    other = stock(folder, precision, model)
    same_start((model, other))
    return model, other.train(), processor


def assert_auto_is_stock(model, other, processor, recorded, floor=0.0):
    """Compare a step that runs layers as they are, one that records them and one that replays them."""
    expected = gradients(other, plain(FastVisionDataCollator(other, processor)(SAMPLES), processor))
    fuse_model(model)
    graphs = LayerGraphs(rehearse=True)
    use_graphs(model, graphs)
    assert apply_checkpointing(model, "auto") == "auto"
    batch = FastVisionDataCollator(model, processor)(SAMPLES)
    for _ in range(3):
        assert_same(gradients(model, batch), expected, floor=floor)
    layers = [layer for kind in graphs._stages.values() for layer in kind.layers.values()]
    assert all(layer.kept is layer.stage.needs_dx for layer in layers)  # without a gradient there is nothing to keep
    assert any(layer.kept for layer in layers) is recorded
    assert len(layers) == graphs.recorded == graphs.replayed // 2


@pytest.mark.parametrize("precision", [*LOADING, "full"])
def test_auto_gives_stocks_loss_and_gradients(folder, precision):
    floor = NO_GRADIENT if (folder.name, precision) == ("gemma3", "full") else 0.0
    assert_auto_is_stock(*both(folder, precision), recorded=precision in RECORDED, floor=floor)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_auto_with_a_frozen_tower(folder, tower):
    assert_auto_is_stock(*both(folder, "16bit", **{f"finetune_{tower}_layers": False}), recorded=True)


def in_bf16(folder, device, precision):
    """FVLM's model with weights in bf16, its processor, and what records it under "auto"."""
    options = {"dtype": torch.bfloat16, "fused_layers": True, "device_map": {"": device}}
    model, processor = FastVisionModel.from_pretrained(str(folder), **{LOADING[precision]: True}, **options)
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, use_gradient_checkpointing="auto")
    same_start((model,))
    graphs = graphs_of(model)
    if graphs is None:
        graphs = LayerGraphs(rehearse=True)
        use_graphs(model, graphs)
        assert apply_checkpointing(model, "auto") == "auto"
    FastVisionModel.for_training(model)
    return model, processor, graphs


def batch_for(model, processor, device):
    """A batch on a device, as the collator makes it for a model with or without fused layers."""
    batch = FastVisionDataCollator(model, processor)(SAMPLES)
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}


def distances(found, expected):
    """How far each gradient is from what it should be, as a share of it."""
    assert set(found[1]) == set(expected[1]) != set()
    off = {name: (found[1][name] - g).norm() / g.norm() for name, g in expected[1].items()}
    return torch.stack(list(off.values())).square().mean().sqrt().item(), max(off.values()).item()


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "16bit"),
        pytest.param("cuda", "16bit", marks=pytest.mark.gpu),
        pytest.param("cuda", "4bit", marks=pytest.mark.gpu),
    ],
)
def test_recorded_in_bf16_under_autocast_is_as_near_the_truth_as_the_layers_themselves(folder, device, precision):
    """Adapters lie in fp32 there, and recordings read copies of them: each must get the gradient all the same."""
    model, processor, graphs = in_bf16(folder, device, precision)
    batch = batch_for(model, processor, device)
    with torch.autocast(device, torch.bfloat16):
        for _ in range(3):
            found = gradients(model, batch)
        assert graphs.replayed > graphs.recorded > 0
        use_graphs(model, None)
        apply_checkpointing(model, False)
        unfuse_model(model)
        batch = plain(batch_for(model, processor, device), processor)
        stock = gradients(model, batch)
    if precision == "4bit":  # no truth without quantization: two roundings of bfloat16
        overall, worst = distances(found, stock)
        assert overall < 0.05
        assert worst < 0.25
        return
    truth = gradients(model.float(), batch)
    ours, theirs = distances(found, truth), distances(stock, truth)
    assert 0 < ours[0] <= 2 * theirs[0]
    assert ours[1] <= 2 * theirs[1]
