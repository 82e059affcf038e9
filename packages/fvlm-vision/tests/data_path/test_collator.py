from __future__ import annotations

import logging
import pickle

import pytest
import torch
from PIL import Image

from fvlm_core.errors import ConfigError, DataError
from fvlm_core.testing import FAMILIES
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.rows import NumberedSample


@pytest.fixture
def parts(shared_model_of, processor_of):
    return shared_model_of("qwen2_vl"), processor_of("qwen2_vl")


def stock(processor, samples, **options):
    """The batch of a direct call of the stock processor."""
    texts, images = [], []
    for sample in samples:
        blocks = [block for message in sample["messages"] for block in message["content"] if isinstance(block, dict)]
        images.append([block["image"] for block in blocks if block["type"] == "image"])
        texts.append(processor.apply_chat_template(sample["messages"], tokenize=False))
    if processor.tokenizer.bos_token and texts[0].startswith(processor.tokenizer.bos_token):
        options["add_special_tokens"] = False
    if any(images):
        options["images"] = images
    return processor(text=texts, padding=True, padding_side="right", return_tensors="pt", **options)


def same(batch, expected) -> None:
    assert set(expected) <= set(batch) | {"labels"}
    for name in set(expected) - {"labels", "token_type_ids"}:  # PaliGemma's: see its own test
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("responses_only", [False, True])
def test_pixels_and_ids_are_those_of_the_stock_processor(family, responses_only, shared_model_of, processor_of, ask):
    processor = processor_of(family)
    collator = FastVisionDataCollator(shared_model_of(family), processor, train_on_responses_only=responses_only)
    batches = [[1], [2, 1]]
    if family != "paligemma":  # its processor wants an image in every sample: see test_paligemma
        batches.append([0, 0])
    if family not in ("mllama", "paligemma"):  # mllama's processor refuses mixed batches: see below
        batches.append([0, 1, 2])
    for counts in batches:
        samples = [ask(images=count, seed=count, answer="total 5 " * (1 + count)) for count in counts]
        expected = stock(processor, samples)
        batch = collator(samples)
        same(batch, expected)
        labels = batch["labels"]
        assert not torch.isin(labels, torch.tensor(sorted(collator.media_ids))).any()
        for row, sample in zip(labels, samples, strict=True):
            text = processor.tokenizer.decode(row[row != -100])
            assert sample["messages"][1]["content"].strip() in text
            assert ("Read this." in text) == (not responses_only)
            assert text.strip().startswith(sample["messages"][1]["content"].strip()) == responses_only


def test_mllama_takes_text_beside_images(shared_model_of, processor_of, ask):
    """Its processor refuses such a batch: the image rows are what it makes of them, the text row sees no image."""
    processor, model = processor_of("mllama"), shared_model_of("mllama")
    collator = FastVisionDataCollator(model, processor)
    with_images = [ask(images=1), ask(images=2, seed=3, answer="one two three")]
    expected = stock(processor, with_images)
    batch = collator([ask(images=0, answer="date"), *with_images])
    same({name: value[1:] for name, value in batch.items()}, expected)
    text_row = batch["cross_attention_mask"][0], batch["pixel_values"][0], batch["aspect_ratio_ids"][0]
    assert not any(part.any() for part in text_row)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


def test_resolution_changes_only_when_asked(parts, ask, picture):
    _, processor = parts
    sample = ask()
    plain = FastVisionDataCollator(*parts)([sample])
    assert plain["image_grid_thw"].tolist() == [[1, 4, 4]]  # 60 → the family's own grid of 28
    grown = FastVisionDataCollator(*parts, min_pixels=112 * 112)([sample])
    assert grown["image_grid_thw"].tolist() == [[1, 8, 8]]
    big = [{"role": "user", "content": [{"type": "image", "image": picture(300, 260)}]}, sample["messages"][1]]
    for bound in ({"resize": 60}, {"max_pixels": 60 * 60}):
        shrunk = FastVisionDataCollator(*parts, **bound)([{**sample, "messages": big}])
        assert shrunk["image_grid_thw"].tolist() == [[1, 4, 4]]
    with pytest.raises(DataError, match="300×260 pixels is over the limit of 77999"):
        FastVisionDataCollator(*parts, max_image_pixels=77_999)([{**sample, "messages": big}])
    once = sample["messages"][0]["content"][0]["image"].resize((112, 112), Image.Resampling.BICUBIC)
    sample["messages"][0]["content"][0]["image"] = once
    assert torch.equal(grown["pixel_values"], stock(processor, [sample])["pixel_values"])  # resampled once


def test_padding_to_a_multiple(parts, ask):
    batch = FastVisionDataCollator(*parts, pad_to_multiple_of=16)([ask(), ask(images=0)])
    assert {batch[name].shape[1] % 16 for name in ("input_ids", "labels", "attention_mask")} == {0}


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "gemma3", "idefics3"])
def test_truncation_cuts_trailing_text_only(family, shared_model_of, processor_of, ask, caplog):
    model, processor = shared_model_of(family), processor_of(family)
    whole = FastVisionDataCollator(model, processor)
    long, short = ask(answer="word " * 60), ask(images=0, answer="x")
    expected = whole([long])
    media_end = int(torch.isin(expected["input_ids"][0], torch.tensor(sorted(whole.media_ids))).nonzero()[-1]) + 1
    limit = media_end + 20
    collator = FastVisionDataCollator(model, processor, max_seq_length=limit)
    with caplog.at_level(logging.WARNING):
        batch = collator([NumberedSample(long, 11), short])
    assert batch["input_ids"].shape[1] == limit
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name][0], expected[name][0, :limit]), name
    for name in set(batch) - {"input_ids", "attention_mask", "labels"}:  # the same images, whole
        if isinstance(batch[name], torch.Tensor) and batch[name].shape[:2] == (2, limit):
            assert torch.equal(batch[name][0], expected[name][0, :limit]), name
    assert torch.equal(batch["labels"][1] == -100, batch["attention_mask"][1] == 0)
    assert collator.overflow_counts.truncated == 1
    assert "row 11" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_no_media_token_is_ever_cut(family, shared_model_of, processor_of, ask):
    model, processor = shared_model_of(family), processor_of(family)
    whole = FastVisionDataCollator(model, processor)
    ids = whole([ask(images=2)])["input_ids"][0]
    media_end = int(torch.isin(ids, torch.tensor(sorted(whole.media_ids))).nonzero()[-1]) + 1
    for limit in (media_end - 1, media_end // 2 + 1):
        collator = FastVisionDataCollator(model, processor, max_seq_length=limit)
        with pytest.raises(DataError, match="left out"):
            collator([ask(images=2)])
        assert (collator.overflow_counts.skipped, collator.overflow_counts.truncated) == (1, 0)
    collator = FastVisionDataCollator(model, processor, max_seq_length=media_end + 4)
    assert torch.equal(collator([ask(images=2)])["input_ids"][0], ids[: media_end + 4])


def test_what_cannot_be_cut_is_left_out_and_counted(parts, ask, caplog):
    wide = NumberedSample(ask(images=4), 3)
    collator = FastVisionDataCollator(*parts, max_seq_length=30)
    with caplog.at_level(logging.WARNING):
        batch = collator([wide, ask(images=0, answer="x")])
    assert len(batch["input_ids"]) == 1
    assert "image_grid_thw" not in batch
    assert collator.overflow_counts.skipped == 1
    assert "row 3" in caplog.text
    with pytest.raises(DataError, match="every sample of a batch"):
        collator([wide])
    empty = collator.keeping_empty_batches()([wide])
    assert (empty["labels"] == -100).all()
    # A response that lies wholly beyond the limit leaves nothing to learn.
    late = ask(images=0, question="word " * 60)
    late_only = FastVisionDataCollator(*parts, max_seq_length=30, train_on_responses_only=True)
    assert len(late_only([late, ask(images=0)])["input_ids"]) == 1


def test_overflow_skip_and_error(parts, ask):
    long, short = ask(answer="word " * 60), ask(images=0, answer="x")
    skipping = FastVisionDataCollator(*parts, max_seq_length=40, overflow="skip")
    assert len(skipping([long, short])["input_ids"]) == 1
    with pytest.raises(DataError, match=r"row 5: a sample has \d+ tokens"):
        FastVisionDataCollator(*parts, max_seq_length=40, overflow="error")([short, NumberedSample(long, 5)])
    assert FastVisionDataCollator(*parts, max_seq_length=40, overflow="error")([short])["input_ids"].shape[0] == 1


def test_the_model_gives_the_limit_and_is_not_kept(parts, ask):
    model, processor = parts
    model.max_seq_length = 24
    try:
        collator = FastVisionDataCollator(model, processor)
    finally:
        del model.max_seq_length
    assert collator.max_seq_length == 24
    assert all(value is not model for value in vars(collator).values())
    restored = pickle.loads(pickle.dumps(collator))
    batch = [ask(images=0, answer="word " * 40), ask(images=0)]
    assert torch.equal(restored(batch)["labels"], collator(batch)["labels"])


def test_dataset_columns_and_formatting_func(parts, ask, picture):
    plain = FastVisionDataCollator(*parts)
    expected = plain([ask(answer="a")])
    expected = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    column = {
        "messages": [{"role": "user", "content": "Read this."}, {"role": "assistant", "content": "a"}],
        "images": [picture()],
    }
    for sample in (column, {"conversations": column["messages"], "image": picture()}):
        same(plain([sample]), expected)
    shaped = FastVisionDataCollator(*parts, formatting_func=lambda row: {**column, "images": [row["scan"]]})
    same(shaped([{"scan": picture()}]), expected)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"overflow": "cut"}, "overflow='cut'"),
        ({"max_seq_length": 0}, "max_seq_length=0"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of=-8"),
        ({"resize": "min"}, "resize='min'"),
        ({"formatting_func": "f"}, "formatting_func='f'"),
        ({"train_on_responses_only": "yes"}, "train_on_responses_only='yes' is not a boolean"),
        ({"packing": 1}, "packing=1 is not a boolean"),
        ({"allow_urls": "no"}, "allow_urls='no' is not a boolean"),
        ({"plan_loss": "yes"}, "plan_loss='yes' is not a boolean"),
        ({"ignore_index": "none"}, "ignore_index='none' is not a label"),
        ({"url_limits": 4}, "url_limits=4 is not a FetchLimits"),
        ({"video_options": {"fps": 1}}, "video_options={'fps': 1} is not a VideoOptions"),
    ],
)
def test_bad_arguments_are_refused(parts, change, part):
    with pytest.raises(ConfigError) as caught:
        FastVisionDataCollator(*parts, **change)
    assert part in str(caught.value)


def test_a_tokenizer_or_no_padding_token_is_refused(parts):
    model, processor = parts
    with pytest.raises(ConfigError, match="handles no images"):
        FastVisionDataCollator(model, processor.tokenizer)
    processor.tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="padding token"):
        FastVisionDataCollator(model, processor)


def test_errors_name_the_row(parts, ask, picture):
    collator = FastVisionDataCollator(*parts)
    bad = ask()
    bad["messages"][0]["content"][0]["image"] = "missing.png"
    with pytest.raises(DataError, match=r"^row 17: the image file 'missing.png'") as caught:
        collator([ask(), NumberedSample(bad, 17)])
    assert caught.value.row == 17
    with pytest.raises(DataError, match=r"^sample 1 of the batch: "):
        collator([ask(), bad])
    thin = ask()  # what only the processor can tell: the family's limit on the aspect ratio
    thin["messages"][0]["content"][0]["image"] = picture(4000, 2)
    with pytest.raises(DataError, match=r"^row 8: the processor refuses a sample .*aspect ratio"):
        collator([ask(), NumberedSample(thin, 8)])


@pytest.mark.parametrize("text", ["<|image_pad|>", "a <|video_pad|> b", "<|vision_start|>"])
def test_text_that_reads_as_media_is_refused(parts, ask, text):
    with pytest.raises(DataError, match="stands for an image"):
        FastVisionDataCollator(*parts)([ask(answer=text)])
