"""Gemma 3's activations do not fit into float16: on a device without bfloat16 it computes in float32."""

import logging

import pytest
import torch
from family_tools import family_batch, prompt_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core import ConfigError, Precision, load_model, origin_of

LARGE = 1e5  # of a norm's weights: beyond 65,504 as soon as they are applied


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory):
    """A tiny Gemma 3 whose residual stream is as large as the real one's."""
    folder = tmp_path_factory.mktemp("large")
    model = AutoModelForImageTextToText.from_pretrained(tiny("gemma3"), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.post_feedforward_layernorm.weight.add_(LARGE)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(tiny("gemma3")).save_pretrained(folder)
    return folder


@pytest.fixture
def without_bfloat16(monkeypatch):
    """What is chosen on a card before Ampere, though there is none."""
    from fvlm_core import load

    choose = load.choose_dtype
    monkeypatch.setattr(
        load, "choose_dtype", lambda dtype, device: torch.float16 if dtype in (None, "auto") else choose(dtype, device)
    )


def loss_of(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize("precision", [Precision.HALF, Precision.NF4, Precision.INT8], ids=str)
def test_it_computes_in_float32(large, without_bfloat16, precision, caplog):
    stock = AutoModelForImageTextToText.from_pretrained(large, dtype=torch.float16)
    batch = family_batch(large, stock)
    assert not loss_of(stock, {**batch, "pixel_values": batch["pixel_values"].half()}).isfinite()
    expected = load_model(large, precision=precision, dtype="float32")
    with caplog.at_level(logging.WARNING):
        model = load_model(large, precision=precision)
    assert "it computes in float32" in caplog.text
    assert origin_of(model).dtype == "float32"
    assert loss_of(model, batch).isfinite()
    assert torch.equal(loss_of(model, batch), loss_of(expected, batch))


def test_float16_by_name_is_refused(large):
    with pytest.raises(ConfigError, match="dtype='float16' does not fit 'gemma3'"):
        load_model(large, precision=Precision.NF4, dtype="float16")


def test_other_families_take_float16(tiny, without_bfloat16):
    assert load_model(tiny("mllama"), precision=Precision.HALF).dtype is torch.float16


@pytest.mark.gpu
def test_it_trains_and_generates_on_a_gpu_without_bfloat16(large, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    model = load_model(large, precision=Precision.NF4)
    assert (model.device.type, model.dtype) == ("cuda", torch.float32)
    on_cpu = load_model(large, precision=Precision.NF4, device_map="cpu", dtype="float32")
    batch = family_batch(large, on_cpu)
    loss = loss_of(model, {name: value.to("cuda") for name, value in batch.items()})
    torch.testing.assert_close(loss.cpu(), loss_of(on_cpu, batch), rtol=1e-3, atol=0)
    prompt = {name: value.to("cuda") for name, value in prompt_of(large, model).items()}
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
