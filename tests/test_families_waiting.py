"""A training step asks the device for nothing, in every family with fused layers; where the others ask is known."""

from __future__ import annotations

import warnings

import pytest
import torch
from matrix_tools import ours, sample
from waiting_tools import Waits

from fvlm_core.checkpointing import apply_checkpointing, graphs_of, use_graphs
from fvlm_core.fused import fuse_model
from fvlm_core.graphs import LayerGraphs
from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_vision import FastVisionDataCollator

FUSED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "pixtral", "mistral3", "gemma3")
_MASK, _PLACES = "_ignore_causal_mask_sdpa", {"get_placeholder_mask", "torch_compilable_check"}
BY_SEGMENTS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "mistral3")
WAITING = {
    "paligemma": _PLACES,
    "internvl": {_MASK, *_PLACES},
    "llava_onevision": {
        _MASK,
        *_PLACES,
        "get_image_features",
        "get_anyres_image_grid_shape",
        "image_size_to_num_patches",
        "unpad_image",
    },
    "idefics3": {
        _MASK,
        "_ignore_bidirectional_mask_sdpa",
        "get_image_features",
        "forward",
        "torch_compilable_check",
    },
    "smolvlm": {
        _MASK,
        "_ignore_bidirectional_mask_sdpa",
        "get_image_features",
        "forward",
        "inputs_merger",
        *_PLACES,
        "a backward pass",
    },
}
"""The functions of transformers that ask for values, or pick rows by a mask, in the families without fused layers: of
5.17 to 5.24, some of which do so in one of them alone."""


WITH_IMAGES = [sample(1, images=2), sample(5, answer="one stamp")]
TEXT = [sample(1, images=0), sample(5, images=0, answer="one stamp")]


def test_every_family_is_in_one_of_the_lists():
    assert {*FUSED, *WAITING} == set(FAMILIES)


def waits_of(model, batch):
    """What the fourth step waits for: by then everything is compiled and recorded."""
    batch = {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    count = torch.tensor(20, device=model.device)
    waits = Waits(model.device)
    for turn in range(4):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            if turn < 3:
                model(**batch, num_items_in_batch=count).loss.backward()
                continue
            with waits:
                model(**batch, num_items_in_batch=count).loss.backward()
    return waits


def prepared(family, tmp_path, precision, mode="auto"):
    model, processor = ours(tiny_checkpoint(family, tmp_path / family), precision, use_gradient_checkpointing=mode)
    if model.device.type == "cpu":
        fuse_model(model)
        use_graphs(model, LayerGraphs(rehearse=True))
        apply_checkpointing(model, mode)
    return model, processor


@pytest.mark.parametrize("samples", [WITH_IMAGES, TEXT], ids=["images", "text"])
@pytest.mark.parametrize("family", FUSED)
def test_a_step_asks_for_nothing(family, samples, tmp_path):
    model, processor = prepared(family, tmp_path, "16bit")
    waits = waits_of(model, FastVisionDataCollator(model, processor)(samples))
    assert not waits.found, waits.told
    assert graphs_of(model).replayed > graphs_of(model).recorded > 0


@pytest.mark.parametrize("family", WAITING)
def test_the_others_ask_where_it_is_said(family, tmp_path):
    """A shorter list is good news, to be told in docs/families.md."""
    model, processor = prepared(family, tmp_path, "16bit")
    found = waits_of(model, FastVisionDataCollator(model, processor)(WITH_IMAGES)).found
    assert set() < found <= WAITING[family]


def test_what_cuda_says_of_its_report_is_no_wait(monkeypatch):
    """As PyTorch warns: of the report itself where it is first asked for, then of each wait."""
    modes, shown = [], []

    def set_mode(mode):
        modes.append(mode)
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all "
                          "synchronizing operations", stacklevel=1)  # fmt: skip

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with Waits(torch.device("cuda")) as waits:
        assert len(shown) == 1
        assert not waits.found
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert modes == ["warn", "default"]
    assert waits.found == {"a backward pass"}
    assert "test_what_cuda_says_of_its_report_is_no_wait" in waits.told[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["4bit", "16bit"])
@pytest.mark.parametrize("family", FUSED)
def test_a_step_does_not_wait_for_a_gpu(family, precision, tmp_path):
    for mode in ("auto", "offload"):
        model, processor = prepared(family, tmp_path / mode, precision, mode)
        for samples, packing in ((WITH_IMAGES, False), (TEXT, False), (WITH_IMAGES, True)):
            if not packing or family in BY_SEGMENTS:
                batch = FastVisionDataCollator(model, processor, packing=packing)(samples)
                waits = waits_of(model, batch)
                assert not waits.found, (mode, packing, samples is TEXT, *waits.told)


@pytest.mark.gpu
@pytest.mark.parametrize("family", WAITING)
def test_the_others_wait_for_a_gpu_where_it_is_said(family, tmp_path):
    model, processor = prepared(family, tmp_path, "16bit")
    found = waits_of(model, FastVisionDataCollator(model, processor)(WITH_IMAGES)).found
    assert found & WAITING[family]
    print(family, sorted(found))
