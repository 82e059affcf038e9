"""Every family in every precision: what was trained, merged and saved, is what plain transformers loads again."""

from __future__ import annotations

import pytest
import torch
from matrix_tools import LOADING, gradients, ours, plain, same_start, sample, stock
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_vision import FastVisionDataCollator, FastVisionModel

SAMPLES = (sample(1, images=2), sample(5, answer="one stamp"))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A family's tiny checkpoint in fp32."""
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("families") / request.param)


def logits(model, processor):
    """What a model in evaluation says to the samples."""
    batch = FastVisionDataCollator(model, processor, plan_loss=False)(SAMPLES)
    with torch.no_grad():
        return model.eval()(**plain(batch, processor)).logits


def reloaded(path):
    """The logits of a saved folder, all of it read by plain transformers."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return logits(model, AutoProcessor.from_pretrained(path))


@pytest.mark.parametrize("precision", LOADING)
def test_a_merged_adapter_reloads_as_what_it_was_merged_onto(folder, precision, tmp_path):
    model, processor = ours(folder, precision)
    other = stock(folder, "16bit", model)
    same_start((model, other))
    expected = logits(other, processor)
    with other.disable_adapter():
        assert (logits(other, processor) - expected).norm() > 0.01 * expected.norm()  # the adapter matters
    model.save_pretrained_merged(tmp_path / "merged", processor)
    assert (reloaded(tmp_path / "merged") - expected).norm() < 1e-5 * expected.norm()
    if precision == "4bit":  # onto the weights that training saw; of 8-bit layers activations are rounded as well
        seen = logits(model, processor)
        model.save_pretrained_merged(tmp_path / "seen", processor, base="dequantized")
        assert (reloaded(tmp_path / "seen") - seen).norm() < 1e-5 * seen.norm()


def test_full_finetuning_reloads_as_it_was(folder, tmp_path):
    model, processor = FastVisionModel.from_pretrained(folder, full_finetuning=True)
    before = logits(model, processor)
    FastVisionModel.for_training(model)
    _, found = gradients(model, FastVisionDataCollator(model, processor)(SAMPLES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.sub_(found[name], alpha=0.1)
    expected = logits(model, processor)
    assert (before - expected).norm() > 1e-3 * expected.norm()
    model.save_pretrained_merged(tmp_path / "trained", processor)
    assert torch.equal(reloaded(tmp_path / "trained"), expected)
