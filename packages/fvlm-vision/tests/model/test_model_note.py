"""What a bound `save_pretrained` notes beside an adapter."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from fvlm_export import read_note, save_pretrained_merged
from fvlm_vision import FastVisionModel


def test_a_saved_adapter_says_what_it_was_trained_over(folder, ask, adapted, tmp_path):
    """So a merge from folders can give what training saw, and knows the base again."""
    model = adapted({"load_in_4bit": True})
    ask.train(model)
    model.save_pretrained(tmp_path / "adapter")
    note = read_note(tmp_path / "adapter")
    assert (note.base, note.precision) == (str(folder), "4bit")
    assert len(note.base_fingerprint) == 64
    assert "model.language_model.layers.0.self_attn.q_proj" in note.quantized
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path / "adapter")
    live = model.save_pretrained_merged(tmp_path / "live", base="dequantized", progress=False)
    cold = save_pretrained_merged(tmp_path / "adapter", tmp_path / "cold", base="dequantized", progress=False)
    one, other = (load_file(merged / "model.safetensors") for merged in (live, cold))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "gone"])
def test_an_adapter_is_saved_whatever_became_of_its_base(folder, name, tmp_path, caplog):
    """A checkpoint of a long run must not fail for a note: the base is of a variant, or its files were moved."""
    base = shutil.copytree(folder, tmp_path / "base")
    if name != "gone":
        (base / "model.safetensors").rename(base / name)
    options = {} if name == "gone" else {"variant": "fp16"}
    model, _ = FastVisionModel.from_pretrained(str(base), load_in_16bit=True, device_map="cpu", **options)
    model = FastVisionModel.get_peft_model(model, r=2)
    (base / "model.safetensors").unlink(missing_ok=True)
    model.save_pretrained(tmp_path / "adapter")
    note = read_note(tmp_path / "adapter")
    assert (note.base, note.base_fingerprint) == (str(base), None)
    assert "lacks model.safetensors" in caplog.text
