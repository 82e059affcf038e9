"""A whole model's saved weights, back in the model that has moved on."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from fvlm_core.errors import CheckpointError
from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_export.reload import holds_weights, load_saved_weights


def model_of(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def disturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("size", ["5GB", "200KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_comes_back(family, size, tmp_path):
    model = model_of(tiny_checkpoint(family, tmp_path / "base"))
    disturb(model)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert holds_weights(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists() == (size == "5GB")
    disturb(model)
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    load_saved_weights(model, tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert value.data_ptr() == places[name]


def test_another_dtype_keeps_its_own(tmp_path):
    base = tiny_checkpoint("gemma3", tmp_path / "base")
    model = model_of(base).to(torch.bfloat16)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    disturb(model)
    load_saved_weights(model, base)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path):
    model = model_of(tiny_checkpoint("mllama", tmp_path / "mllama"))
    with pytest.raises(CheckpointError, match="lacks"):
        load_saved_weights(model, tiny_checkpoint("gemma3", tmp_path / "gemma3"))


def test_torn_files_are_refused(tmp_path):
    folder = tiny_checkpoint("qwen2_vl", tmp_path / "base")
    model = model_of(folder)
    assert not holds_weights(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        load_saved_weights(model, folder)
    (folder / "model.safetensors").unlink()
    for written in (json.dumps({"weights": {}}), "{"):
        (folder / "model.safetensors.index.json").write_text(written)
        assert holds_weights(folder)
        with pytest.raises(CheckpointError, match=r"holds no weight_map|not valid JSON"):
            load_saved_weights(model, folder)
