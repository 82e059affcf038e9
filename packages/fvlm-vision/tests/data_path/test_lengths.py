"""Tokens are counted as the collator makes them, from the headers of images alone."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from fvlm_core.errors import ConfigError, DataError
from fvlm_core.testing import FAMILIES
from fvlm_vision import FastVisionTrainer
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.media import ImageReader
from fvlm_vision.rows import NumberedRows


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_the_collators(family, shared_model_of, processor_of, ask, picture):
    collator = FastVisionDataCollator(shared_model_of(family), processor_of(family))
    samples = [ask(answer="total 5 " * n, seed=n, images=1) for n in range(1, 4)]
    samples[2]["messages"][0]["content"][0]["image"] = picture(150, 40)
    samples.append(ask(images=0, question="word " * 9))
    samples += [ask(images=2), ask(images=3)]  # LLaVA-OneVision cuts an image into crops only where it is alone
    made = [int(collator([sample])["attention_mask"].sum()) for sample in samples]
    counted = collator.token_counter().lengths(samples)
    assert counted == made
    assert len(set(made)) > 2


def test_limit_resize_and_column(shared_model_of, processor_of, ask, picture):
    parts = shared_model_of("qwen2_vl"), processor_of("qwen2_vl")
    sample = ask()
    assert FastVisionDataCollator(*parts, max_seq_length=9).token_counter().lengths([sample]) == [9]
    plain, small = (
        FastVisionDataCollator(*parts, **options).token_counter().lengths([{**sample, "images": [], "x": 1}])[0]
        for options in ({"min_pixels": 112 * 112}, {})
    )
    assert plain - small == 12  # 16 tokens an image, and 4
    assert FastVisionDataCollator(*parts).token_counter().lengths([{"tokens": 77}], "tokens") == [77]


def test_only_the_header_is_read(picture, tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    stored = io.BytesIO()
    picture(300, 200).save(stored, "JPEG", exif=rotated)
    whole = stored.getvalue()
    reader = ImageReader()
    assert reader.size(whole) == reader.read(whole).size == (200, 300)
    assert reader.size({"bytes": whole[:2000], "path": None}) == (200, 300)  # the pixels are missing
    with pytest.raises(DataError, match="corrupt"):
        reader.read(whole[:2000])
    assert reader.size(picture(30, 20)) == (30, 20)
    with pytest.raises(DataError, match="over the limit"):
        ImageReader(max_image_pixels=100).size(whole)


def test_a_bad_row_is_named(shared_model_of, processor_of, ask):
    counter = FastVisionDataCollator(shared_model_of("qwen2_vl"), processor_of("qwen2_vl")).token_counter()
    bad = ask()
    bad["messages"][0]["content"][0]["image"] = "missing.png"
    with pytest.raises(DataError, match=r"^row 1: the image file 'missing.png'"):
        counter.lengths(NumberedRows([ask(), bad]))


def test_the_trainer_groups_by_tokens_with_images(lora, processor, ask, picture, arguments, trained):
    long_text, big_image = "word " * 12, picture(112, 112)
    rows = []
    for n in range(64):
        sample = ask(images=n % 2, answer=long_text if n % 4 == 0 else "x", seed=n)
        if n % 4 == 1:
            sample["messages"][0]["content"][0]["image"] = big_image
        rows.append(sample)
    trainer = FastVisionTrainer(
        model=lora(),
        args=arguments(train_sampling_strategy="group_by_length", per_device_train_batch_size=4),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
    )
    lengths = trainer.data_collator.token_counter().lengths(rows)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(64))
    batches = [[lengths[i] for i in order[start : start + 4]] for start in range(0, 64, 4)]
    spread = sum(max(batch) - min(batch) for batch in batches)
    torch.manual_seed(0)
    chance = torch.tensor(lengths)[torch.randperm(64)].reshape(16, 4)
    assert spread < float((chance.max(1).values - chance.min(1).values).sum()) / 2
    assert len(trained(trainer)) == 3
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_collator_of_ones_own_cannot_be_asked(lora, processor, rows, arguments):
    trainer = FastVisionTrainer(
        model=lora(),
        args=arguments(train_sampling_strategy="group_by_length"),
        train_dataset=rows,
        data_collator=lambda samples: samples,
        processing_class=processor,
    )
    with pytest.raises(ConfigError, match="FastVisionDataCollator to count"):
        trainer.get_train_dataloader()
