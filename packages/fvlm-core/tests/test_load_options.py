"""Options of loading that are transformers' own: none is dropped on the way."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from fvlm_core import CheckpointError, Precision, load_model
from fvlm_core.options import MODEL_OPTIONS


def test_options_reach_the_model(tiny):
    model = load_model(tiny("qwen2_vl"), precision=Precision.HALF, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert model.model.visual.config._attn_implementation == "eager"


def test_every_option_of_the_model_reaches_transformers(tiny, tmp_path, monkeypatch):
    """What each does is transformers' own; that none is dropped on the way is ours."""
    given = {
        "attn_implementation": "eager",
        "code_revision": "main",
        "disable_mmap": True,
        "experts_implementation": "eager",
        "key_mapping": {"^nothing": "model"},
        "max_memory": {"cpu": "10GiB"},
        "offload_buffers": True,
        "offload_folder": str(tmp_path),
    }
    assert {*given, "variant"} == set(MODEL_OPTIONS)  # that has a test of its own
    seen = {}
    plain = AutoModelForImageTextToText.from_pretrained

    def watched(*args, **options):
        seen.update(options)
        return plain(*args, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watched)
    load_model(tiny("qwen2_vl"), precision=Precision.HALF, **given)
    assert {name: seen[name] for name in given} == given


def test_names_of_weights_are_mapped_as_asked(tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "renamed")
    stored = load_file(folder / "model.safetensors")
    renamed = {name.replace("visual.", "eyes.", 1): value for name, value in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks .* such as 'model\.visual"):
        load_model(folder, precision=Precision.HALF)
    model = load_model(folder, precision=Precision.HALF, key_mapping={"^eyes": "visual"})
    expected = load_model(tiny("qwen2_vl"), precision=Precision.HALF).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_limit_of_memory_that_nothing_asks_for_is_said(tiny, caplog):
    load_model(tiny("qwen2_vl"), precision=Precision.HALF, device_map="cpu", max_memory={"cpu": "10GiB"})
    assert [text for text in caplog.messages if text.startswith("max_memory does nothing here: ")]


def test_a_variant_of_the_files_is_taken(tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen2_vl"), tmp_path / "variant")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_model(folder, precision=Precision.HALF)
    model = load_model(folder, precision=Precision.HALF, variant="fp16")
    expected = load_model(tiny("qwen2_vl"), precision=Precision.HALF).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
