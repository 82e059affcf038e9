"""LoftQ in every family: where PEFT starts from, and a step that is PEFT's."""

from __future__ import annotations

import pytest
import torch
from matrix_tools import plain, sample
from peft import LoftQConfig, LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_vision import FastVisionDataCollator, FastVisionModel

OPTIONS = {"r": 4, "lora_alpha": 4}
QUANTIZED = {"loftq_bits": 4, "loftq_iter": 1}


def parts_of(layer):
    """The weight that is left, and what the adapter adds to it."""
    added = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return layer.weight.detach(), added.detach()


def on_device(batch, model):
    return {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_loftq_starts_where_peft_does(family, tmp_path):
    pytest.importorskip("scipy", reason="PEFT's LoftQ needs it")
    folder = tiny_checkpoint(family, tmp_path / family)
    model, processor = FastVisionModel.from_pretrained(folder, load_in_16bit=True, dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(model.device)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = FastVisionModel.get_peft_model(model, loftq_config=QUANTIZED, **OPTIONS)
    targets = list(model.fvlm_targets.modules)
    config = LoraConfig(
        target_modules=targets, init_lora_weights="loftq", loftq_config=LoftQConfig(**QUANTIZED), **OPTIONS
    )
    stock = get_peft_model(base, config).train()
    assert targets
    for name in targets:
        layers = [one.get_base_model().get_submodule(name) for one in (model, stock)]
        (left, added), (expected, more) = map(parts_of, layers)
        original = before[f"{name}.weight"]
        assert 0 < (left + added - original).norm() < (left - original).norm(), name
        torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(added, more, rtol=1e-3, atol=1e-5)
    samples = [sample(1, images=2), sample(5, answer="one stamp")]
    loss = model(**on_device(FastVisionDataCollator(model, processor)(samples), model)).loss
    batch = FastVisionDataCollator(stock, processor, plan_loss=False)(samples)
    expected = stock(**on_device(plain(batch, processor), stock)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for one in (loss, expected):
        one.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, stock)]
    assert set(grads[0]) == set(grads[1]) != set()
    for name, gradient in grads[1].items():
        assert (grads[0][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-8, name
