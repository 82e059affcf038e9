"""Random samples: the collator gives a valid batch or a typed error, never anything else."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.arch import facts_for, media_token_ids
from fvlm_core.errors import DataError, FvlmError
from fvlm_core.testing import FAMILIES
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.rows import NumberedSample


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (80, 40)), "JPEG", exif=exif)


RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
ODD_BUT_GOOD = {
    "animated GIF": encoded(RED, "GIF", save_all=True, append_images=[BLUE]),
    "CMYK JPEG": encoded(RED.convert("CMYK"), "JPEG"),
    "palette PNG": encoded(RED.convert("P")),
    "1 bit": encoded(RED.convert("1")),
    "16-bit PNG": encoded(Image.fromarray(np.full((30, 40), 40_000, np.uint16))),
    "EXIF-rotated JPEG": turned(),
    "transparent PNG": encoded(RED.convert("RGBA")),
    "float array": np.full((30, 40, 3), 0.5),
    "tensor": torch.zeros(3, 30, 40),
}
REFUSED = {
    "truncated PNG": encoded(Image.effect_noise((40, 30), 50))[:-200],
    "empty": b"",
    "no image": b"GIF89a",
    "NaN array": np.full((4, 4, 3), np.nan),
    "zero size": np.zeros((0, 4, 3), np.uint8),
    "20,000 × 20,000": encoded(Image.new("1", (20_000, 20_000))),
    "sliver": np.zeros((1, 900, 3), np.uint8),  # over the processor's limit on the aspect ratio
    "missing file": "missing.png",
    "address": "https://example.com/a.png",
    "none": None,
    "number": 3,
}


@pytest.fixture
def parts(shared_model_of, processor_of):
    return shared_model_of("qwen2_vl"), processor_of("qwen2_vl")


def about(image: object) -> dict:
    turns = [{"role": "user", "content": "<image>Read."}, {"role": "assistant", "content": "x"}]
    return {"messages": turns, "images": [image]}


def about_nothing() -> dict:
    return {"messages": [{"role": "user", "content": "Say x."}, {"role": "assistant", "content": "x"}]}


@pytest.mark.parametrize("name", ODD_BUT_GOOD)
def test_odd_images_are_handled(parts, name):
    batch = FastVisionDataCollator(*parts)([about(ODD_BUT_GOOD[name])])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 4] if name == "EXIF-rotated JPEG" else [1, 4, 6]]
    assert torch.isfinite(batch["pixel_values"]).all()


@pytest.mark.parametrize("name", REFUSED)
def test_bad_images_are_refused_with_their_row(parts, name):
    with pytest.raises(DataError) as caught:
        FastVisionDataCollator(*parts)([about(RED), NumberedSample(about(REFUSED[name]), 4)])
    assert str(caught.value).startswith("row 4: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


WORDS = st.text(alphabet="ab <>|[]{}%\n\té🙂", max_size=30) | st.sampled_from(
    ["<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|im_end|>", "{{ x }}", "<|im_start|>assistant\n"]
)
IMAGES = st.one_of(
    st.builds(lambda w, h: Image.new("RGB", (w, h)), st.integers(0, 90), st.integers(0, 90)),
    st.sampled_from([*ODD_BUT_GOOD.values(), *REFUSED.values()]),
    st.binary(max_size=20),
)
VIDEOS = st.one_of(
    st.lists(IMAGES, max_size=4),
    st.builds(
        lambda frames, rate: {"frames": np.zeros((frames, 30, 40, 3), np.uint8), "fps": rate},
        st.integers(0, 5),
        st.sampled_from([None, 2.0, -1, "2"]),
    ),
    st.sampled_from([None, 7, "missing.mp4", b"no video"]),
)
BLOCKS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, WORDS),
    st.builds(lambda image: {"type": "image", "image": image}, IMAGES),
    st.builds(lambda video: {"type": "video", "video": video}, VIDEOS),
    st.just({"type": "image"}),
    st.just({"type": "audio"}),
)
MESSAGES = st.builds(
    lambda role, content, flags: {"role": role, "content": content, **flags},
    st.sampled_from(["user", "assistant", "system", "user", "assistant", "nobody"]),
    WORDS | st.lists(BLOCKS, max_size=3) | st.none(),
    st.sampled_from([{}, {}, {}, {"train": False}]),
)
SAMPLES = st.one_of(
    st.builds(lambda m: {"messages": m}, st.lists(MESSAGES, max_size=4)),
    st.builds(lambda m, i: {"messages": m, "images": i}, st.lists(MESSAGES, max_size=4), st.lists(IMAGES, max_size=2)),
    st.builds(lambda p, c, i: {"prompt": p, "completion": c, "images": i}, WORDS, WORDS, st.lists(IMAGES, max_size=2)),
    st.builds(lambda m, v: {"messages": m, "videos": v}, st.lists(MESSAGES, max_size=4), st.lists(VIDEOS, max_size=2)),
    st.builds(
        lambda images, videos, answer: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Read."}]},
                {"role": "assistant", "content": answer},
            ],
            "images": images,
            "videos": videos,
        },
        st.lists(st.sampled_from([*ODD_BUT_GOOD.values()]), max_size=3),
        st.lists(st.sampled_from([np.zeros((n, 30, 40, 3), np.uint8) for n in (1, 2, 3, 4)]), max_size=2),
        st.text(alphabet="abc ", min_size=1, max_size=60),
    ),
)


FAMILIAR = st.builds(
    lambda sizes, question, answer: {
        "messages": [
            {"role": "user", "content": [{"type": "image"} for _ in sizes] + [{"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [Image.new("RGB", size, "red") for size in sizes],
    },
    st.lists(st.tuples(st.integers(1, 130), st.integers(1, 130)), max_size=3),
    st.sampled_from(["Read.", "word " * 20]),
    st.sampled_from(["x", "seven pages " * 9]),
)
"""In the words that every family's template reads: what is refused here is refused for its images or its length."""


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(SAMPLES, min_size=1, max_size=3),
    responses_only=st.booleans(),
    overflow=st.sampled_from(["truncate", "skip", "error"]),
    limit=st.sampled_from([None, 12, 30]),
    packing=st.booleans(),
)
def test_a_valid_batch_or_a_typed_error(parts, samples, responses_only, overflow, limit, packing):
    model, processor = parts
    options = {"max_seq_length": limit, "overflow": overflow, "train_on_responses_only": responses_only}
    collator = FastVisionDataCollator(model, processor, packing=packing, **options)
    try:
        batch = collator(samples)
    except FvlmError:
        return
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape
    learned = labels != -100
    assert torch.equal(labels[learned], ids[learned])
    assert not torch.isin(labels, torch.tensor(sorted(collator.media_ids))).any()
    if packing:
        positions = batch["position_ids"][0, 0]
        starts = (positions == 0).nonzero().flatten().tolist()
        assert "attention_mask" not in batch
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            assert limit is None or end - start <= limit
            assert not learned[0, start]
            assert learned[0, start:end].any()
    else:
        assert limit is None or ids.shape[1] <= limit
        assert batch["attention_mask"].shape == ids.shape
        assert not (learned & (batch["attention_mask"] == 0)).any()
        assert learned[:, 1:].any(dim=1).all()
    tokens = processor.tokenizer
    grids = {}
    for medium in ("image", "video"):
        placeholders = int((ids == tokens.convert_tokens_to_ids(f"<|{medium}_pad|>")).sum())
        grids[medium] = batch.get(f"{medium}_grid_thw", torch.zeros(0, 3, dtype=torch.int64))
        assert placeholders == int(grids[medium].prod(dim=1).sum()) // 4
        pixels = batch.get("pixel_values" if medium == "image" else "pixel_values_videos", torch.zeros(0))
        assert len(pixels) == int(grids[medium].prod(dim=1).sum())
        assert torch.isfinite(pixels).all()
    starts, ends = (int((ids == tokens.convert_tokens_to_ids(f"<|vision_{end}|>")).sum()) for end in ("start", "end"))
    assert starts == ends == len(grids["image"]) + len(grids["video"])  # no span cut


def features_of(model, batch):
    """How many tokens the model makes of a batch's images and videos, seen in a forward pass with a finite loss."""
    counted, inside = [], []

    def counting(method):
        def call(*arguments, **options):
            inside.append(method)  # Qwen3-VL's videos are made by its method for images
            found = method(*arguments, **options)
            inside.pop()
            if not inside:
                features = found.pooler_output
                features = features if isinstance(features, tuple | list) else [features]
                counted.append(sum(one.shape[:-1].numel() for one in features))
            return found

        return call

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("get_image_features", "get_video_features"):
            if hasattr(model.model, name):
                patch.setattr(model.model, name, counting(getattr(model.model, name)))
        assert torch.isfinite(model(**batch).loss)
    return sum(counted)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(SAMPLES | FAMILIAR, min_size=1, max_size=3),
    responses_only=st.booleans(),
    overflow=st.sampled_from(["truncate", "skip", "error"]),
    limit=st.sampled_from([None, 8, 14, 40]),
    packing=st.booleans(),
)
def test_a_batch_that_the_model_takes_or_a_typed_error(
    family, shared_model_of, processor_of, samples, responses_only, overflow, limit, packing
):
    model, processor = shared_model_of(family), processor_of(family)
    options = {"max_seq_length": limit, "overflow": overflow, "train_on_responses_only": responses_only}
    try:
        collator = FastVisionDataCollator(model, processor, packing=packing, **options)
        batch = collator(samples)
    except FvlmError:
        return
    ids, labels = batch["input_ids"], batch["labels"]
    learned = labels != -100
    assert ids.shape == labels.shape
    assert learned.any()
    assert torch.equal(labels[learned], ids[learned])
    assert not torch.isin(labels, torch.tensor(sorted(collator.media_ids))).any()
    assert packing or limit is None or ids.shape[1] <= limit
    media = media_token_ids(facts_for(model), model.config, processor)
    places = int(torch.isin(ids, torch.tensor(sorted(media.image | media.video))).sum())
    if family == "mllama":  # a token for each image, whose features are attended to and take no places
        assert places == int((batch["aspect_ratio_ids"] > 0).sum() if "aspect_ratio_ids" in batch else 0)
        assert torch.isfinite(model(**batch).loss)
    else:
        videos = len(batch.get("pixel_values_videos", [])) if family == "llava_onevision" else 0
        # The model puts a break behind each video; from transformers 5.24 on it is counted among the features.
        assert places - features_of(model, batch) in (0, videos)


def test_images_and_videos_in_one_batch_are_refused_where_the_processor_keeps_one_of_them(
    shared_model_of, processor_of
):
    if "smolvlm" not in FAMILIES:
        pytest.fail("its processor needs num2words, which the tests' environment has")
    collator = FastVisionDataCollator(shared_model_of("smolvlm"), processor_of("smolvlm"))
    turns = [{"role": "user", "content": "<video>Read."}, {"role": "assistant", "content": "x"}]
    filmed = {"messages": turns, "videos": [np.zeros((1, 30, 40, 3), np.uint8)]}
    assert {"pixel_values"} <= set(collator([filmed])) & set(collator([about(RED)]))
    with pytest.raises(DataError, match=r"^row 3: a video is in one batch with images, .* frames as images"):
        collator([about(RED), NumberedSample(filmed, 3)])


def test_a_batch_of_one_image_token_is_refused_where_the_model_does_not_take_it(shared_model_of, processor_of):
    model, processor = shared_model_of("mistral3"), processor_of("mistral3")
    collator, small = FastVisionDataCollator(model, processor), Image.new("RGB", (8, 8))
    with pytest.raises(DataError, match=r"^row 3: the images of a batch come to 1 token of the 2 .* min_pixels"):
        collator([about_nothing(), NumberedSample(about(small), 3)])
    batch = collator([about(small), about(small)])
    assert features_of(model, batch) == 2
    assert "pixel_values" not in collator([about_nothing()])
