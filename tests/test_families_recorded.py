"""Every family in every precision under "auto": layers run as recordings that keep what they compute, as stock."""

from __future__ import annotations

import pytest
import torch
from matrix_tools import LOADING, assert_same, gradients, ours, plain, same_start, sample, stock
from transformers import AutoModelForImageTextToText

from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.fused import fuse_model
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
