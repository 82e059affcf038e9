"""Every family with fused and recorded layers against stock: what is trained, what batches hold, what is no number."""

from __future__ import annotations

import pytest
import torch
from matrix_tools import assert_same, curve, gradients, ours, plain, same_start, sample, stock
from parity_tools import trainable

from fvlm_core.checkpointing import apply_checkpointing, graphs_of, use_graphs
from fvlm_core.fused import fuse_model
from fvlm_core.graphs import LayerGraphs
from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_vision import FastVisionDataCollator

STEPS = 32
VARIANTS = [
    {"use_dora": True},
    {"use_rslora": True, "modules_to_save": ["lm_head"]},
    {"bias": "all"},
]
NO_GRADIENT = 1e-7
"""Norm of a gradient that is rounding alone: of a bias of all keys, which changes no attention."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A family's tiny checkpoint in fp32."""
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("families") / request.param)


def both(folder, **options):
    """FVLM's model with fused layers that are recorded, stock's with the same adapter, and the processor."""
    model, processor = ours(folder, "16bit", **options)
    other = stock(folder, "16bit", model).train()
    if options.get("bias") == "all":  # of towers with adapters; PEFT's is of the projector too
        for name in set(trainable(other)) - set(trainable(model)):
            assert name.endswith(".bias")
            other.get_parameter(name).requires_grad_(False)
    same_start((model, other))
    fuse_model(model)
    use_graphs(model, LayerGraphs(rehearse=True))
    apply_checkpointing(model, True)
    return model, other, processor


@pytest.fixture(scope="module")
def pair(folder):
    """One pair for all tests that only look at gradients."""
    return both(folder)


def batches_of(model, other, processor, samples):
    """A batch for FVLM's model, and the one that stock gets."""
    theirs = plain(FastVisionDataCollator(other, processor)(samples), processor)
    return FastVisionDataCollator(model, processor)(samples), theirs


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_of_lora_equal_stocks(folder, options):
    model, other, processor = both(folder, **options)
    batch, theirs = batches_of(model, other, processor, [sample(1, images=2), sample(5, answer="one stamp")])
    expected = gradients(other, theirs)
    assert len(set(trainable(other)) - set(expected[1])) <= 1  # LLaVA-OneVision does not read its tower's last norm
    for _ in range(3):
        assert_same(gradients(model, batch), expected, floor=NO_GRADIENT)
    assert (graphs_of(model).recorded > 0) is ("use_dora" not in options)


def test_dropout_drops_all_some_or_nothing(folder):
    model, _, processor = both(folder, lora_dropout=0.5)
    batch = FastVisionDataCollator(model, processor)([sample(1, images=2), sample(5)])
    losses = {0.5: [model(**batch).loss.item() for _ in range(2)]}
    assert losses[0.5][0] != losses[0.5][1]
    for share in (0.0, 1.0):
        for name, module in model.named_modules():
            if "lora_dropout" in name and isinstance(module, torch.nn.Dropout):
                module.p = share
        losses[share] = [model(**batch).loss.item() for _ in range(3)]
    use_graphs(model, None)
    model.eval()
    assert losses[0.0] == pytest.approx([model(**batch).loss.item()] * 3, rel=1e-5)
    with model.disable_adapter():
        assert losses[1.0] == pytest.approx([model(**batch).loss.item()] * 3, rel=1e-5)
    assert losses[0.0][0] != pytest.approx(losses[1.0][0], rel=1e-4)


def test_gradients_add_up_over_batches_of_any_images(pair, folder):
    """Two images and one, one image twice, several at once; and texts alone where the family takes them."""
    model, other, processor = pair
    micro = [[sample(1, images=2), sample(5)], [sample(2), sample(3, answer="blue")], [sample(4, images=3)]]
    if folder.name != "paligemma":
        micro.append([sample(6, images=0), sample(7, images=0, answer="no picture at all")])
    pairs = [batches_of(model, other, processor, samples) for samples in micro]

    def added(one, batches):
        one.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = one(**batch).loss / len(batches)
            loss.backward()
            total += loss.detach()
        return total, {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}

    expected = added(other, [theirs for _, theirs in pairs])
    for _ in range(3):
        assert_same(added(model, [batch for batch, _ in pairs]), expected)
    assert graphs_of(model).replayed > graphs_of(model).recorded > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_numbers_that_are_none_go_where_stocks_go(pair, value):
    model, other, processor = pair
    batch, theirs = batches_of(model, other, processor, [sample(1, images=2), sample(5)])
    for one in (batch, theirs):
        one["pixel_values"] = one["pixel_values"].clone()
        one["pixel_values"].view(-1)[7] = value
    expected = gradients(other, theirs)
    bad = {name for name, gradient in expected[1].items() if not gradient.isfinite().all()}
    assert not expected[0].isfinite()
    assert bad
    for _ in range(3):
        loss, found = gradients(model, batch)
        assert not loss.isfinite()
        assert {name for name, gradient in found.items() if not gradient.isfinite().all()} == bad
    with torch.no_grad():
        sound, theirs = batches_of(model, other, processor, [sample(1, images=2), sample(5)])
        torch.testing.assert_close(model(**sound).loss, other(**theirs).loss, rtol=1e-5, atol=0)  # nothing stays behind


def test_a_curve_of_32_steps_is_stocks(folder):
    model, other, processor = both(folder)
    shown = [[sample(number % 4, answer="one stamp " * (1 + number % 3))] for number in range(STEPS)]
    pairs = [batches_of(model, other, processor, samples) for samples in shown]
    curves = [curve(one, batches) for one, batches in zip((model, other), zip(*pairs, strict=True), strict=True)]
    assert curves[1][-1] < curves[1][0] - 0.1  # it learns: two flat curves would agree too
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)
    assert graphs_of(model).replayed > graphs_of(model).recorded > 0
