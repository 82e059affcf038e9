"""Pixels that travel as bytes are, on the device, what the stock processor makes of them."""

from __future__ import annotations

import logging
import pickle
from functools import partial

import pytest
import torch
from PIL import Image

from fvlm_core.testing import FAMILIES
from fvlm_vision import FastVisionTrainer, pixels
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.pixels import keeps_bytes, with_pixel_values

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def test_the_families_that_keep_bytes(processor_of):
    assert tuple(family for family in FAMILIES if keeps_bytes(processor_of(family))) == QWEN
    processor = processor_of("qwen2_vl")
    processor.image_processor.do_normalize = False
    assert not keeps_bytes(processor)


def other_name(images):  # bytes are never asked for: the processor's own values come back
    images.preprocess = partial(type(images).preprocess, images)
    images._preprocess_images = vars(images).pop("_preprocess")


def other_order(images):
    ours = vars(images)["_preprocess"]

    def columns_first(*args, **kwargs):
        made = ours(*args, **kwargs)
        made["pixel_values"] = made["pixel_values"].unflatten(1, (3, 14, 14)).transpose(2, 3).flatten(1)
        return made

    images._preprocess = columns_first


def other_arguments(images):
    ours = vars(images)["_preprocess"]
    images._preprocess = lambda pictures, patch_size, **kwargs: ours(pictures, patch=patch_size, **kwargs)


@pytest.mark.parametrize("changed", [other_name, other_order, other_arguments])
def test_another_transformers_gets_its_own_values(changed, shared_model_of, processor_of, ask, monkeypatch, caplog):
    make = pixels.byte_processor

    def byte_processor(processor):
        made = make(processor)
        changed(made.image_processor)
        return made

    monkeypatch.setattr(pixels, "byte_processor", byte_processor)
    collator = FastVisionDataCollator(shared_model_of("qwen2_vl"), processor_of("qwen2_vl"))
    with caplog.at_level(logging.WARNING, logger="fvlm_vision"):
        batch = collator.keeping_bytes()([ask()])
    assert "they are made on the CPU" in caplog.text
    assert torch.equal(batch["pixel_values"], collator([ask()])["pixel_values"])


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("packing", [False, True])
def test_values_are_the_processors_bit_for_bit(family, packing, shared_model_of, processor_of, ask, picture):
    processor = processor_of(family)
    collator = FastVisionDataCollator(shared_model_of(family), processor, packing=packing)
    samples = [ask(images=2), ask(images=0), ask(images=1, seed=7)]
    samples[2]["messages"][0]["content"][0]["image"] = picture(300, 90).convert("L")
    expected = collator(samples)
    batch = pickle.loads(pickle.dumps(collator.keeping_bytes()))(samples)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].numel() * 2 == expected["pixel_values"].numel()
    with pytest.raises((RuntimeError, IndexError)):  # a model is not given them unnoticed
        shared_model_of(family)(**batch)
    found = with_pixel_values(batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
    direct = processor.image_processor(images=[picture(70, 80)], return_tensors="pt")["pixel_values"]
    assert direct.dtype == torch.float32  # the processor itself is as it was


def test_batches_without_images_and_other_families_stay_as_they_are(shared_model_of, processor_of, ask):
    for family, images in (("qwen2_vl", 0), ("gemma3", 1)):
        collator = FastVisionDataCollator(shared_model_of(family), processor_of(family))
        expected, batch = collator([ask(images=images)]), collator.keeping_bytes()([ask(images=images)])
        assert set(batch) == set(expected)
        assert with_pixel_values(batch) is batch


def test_training_on_bytes_is_training_on_values(lora, processor, rows, arguments, trained):
    ours = FastVisionTrainer(
        model=lora(), args=arguments(), train_dataset=rows, eval_dataset=rows[:4], processing_class=processor
    )
    assert any("pixel_scale" in batch for batch in ours.get_train_dataloader())
    assert "pixel_scale" not in ours.data_collator([rows[1]])
    plain = FastVisionTrainer(
        model=lora(), args=arguments(), train_dataset=rows, eval_dataset=rows[:4], processing_class=processor
    )
    plain._get_collator_with_removed_columns = lambda data_collator, description=None: data_collator
    assert not any("pixel_scale" in batch for batch in plain.get_train_dataloader())
    assert trained(ours) == trained(plain)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_a_changed_size_of_grid_and_resize_hold_as_well(shared_model_of, processor_of, picture):
    collator = FastVisionDataCollator(shared_model_of("qwen2_vl"), processor_of("qwen2_vl"), max_pixels=6000)
    turns = [{"role": "user", "content": "<image>Read."}, {"role": "assistant", "content": "x"}]
    sample = {"messages": turns, "images": [picture(200, 100, seed=3).resize((150, 90), Image.Resampling.BICUBIC)]}
    expected, found = collator([sample]), with_pixel_values(collator.keeping_bytes()([sample]))
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
