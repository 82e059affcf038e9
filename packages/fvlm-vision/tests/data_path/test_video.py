"""Videos: the stock processor's tensors, masked labels, the model's own positions, and errors of one sentence."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch

from fvlm_core.errors import ConfigError, DataError, MissingExtraError
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.media import ImageReader
from fvlm_vision.video import VideoOptions, VideoReader

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture
def film(picture):
    """Frames of one size, different for each seed."""
    return lambda frames=4, size=(60, 70), seed=0: [picture(*size, seed=100 * seed + n) for n in range(frames)]


@pytest.fixture
def tell(film):
    """A conversation about a video, by default 4 frames at 2 a second."""

    def make(frames=None, answer="seven pages", fps=2.0, extra=()):
        blocks = [
            {"type": "video", "video": film() if frames is None else frames, "fps": fps},
            *extra,
            {"type": "text", "text": "What?"},
        ]
        return {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]}

    return make


def array(frames):
    return np.stack([np.asarray(frame) for frame in frames])


def stock(processor, samples, **videos_kwargs):
    """The batch of a direct call of the stock processor."""
    blocks = [sample["messages"][0]["content"] for sample in samples]
    videos = [b for content in blocks for b in content if b["type"] == "video"]
    images = [[b["image"] for b in content if b["type"] == "image"] for content in blocks]
    metadata = [
        {"total_num_frames": len(v["video"]), "fps": v["fps"], "frames_indices": list(range(len(v["video"])))}
        for v in videos
    ]
    return processor(
        text=[processor.apply_chat_template(sample["messages"], tokenize=False) for sample in samples],
        images=images if any(images) else None,
        videos=[array(v["video"]) for v in videos],
        videos_kwargs={"video_metadata": metadata, "do_sample_frames": False, **videos_kwargs},
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_and_logits_are_those_of_stock(family, shared_model_of, processor_of, tell, film, picture):
    model, processor = shared_model_of(family), processor_of(family)
    image = {"type": "image", "image": picture()}
    slow = tell(film(6, (40, 90), seed=2), fps=0.7, extra=[image])  # two whole seconds between Qwen2.5-VL's pairs
    samples = [tell(), slow]
    expected = stock(processor, samples)
    batch = FastVisionDataCollator(model, processor)(samples)
    assert "pixel_values_videos" in expected
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(batch[name]), torch.as_tensor(value), rtol=0, atol=0, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**expected).logits, rtol=1e-5, atol=1e-5)
    told = FastVisionDataCollator(model, processor, train_on_responses_only=True)(samples)["labels"]
    for sample in samples:
        sample["messages"].insert(0, {"role": "system", "content": "Be brief.", "train": False})
    in_part = FastVisionDataCollator(model, processor)(samples)["labels"]  # the turns with the videos are learned
    assert "What?" in processor.tokenizer.decode(in_part[in_part != -100])
    for labels in (batch["labels"], told, in_part):
        text = processor.tokenizer.decode(labels[labels != -100])
        assert "seven pages" in text
        assert "seconds" not in text  # the times that Qwen3-VL's processor writes between the frames
        assert "<|v" not in text


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_the_generic_path_takes_frames(family, shared_model_of, processor_of, tell, film):
    processor, samples = processor_of(family), [tell(), tell(film(seed=4), answer="blue")]  # as many frames in each
    batch = FastVisionDataCollator(shared_model_of(family), processor)(samples)
    expected = stock(processor, samples)
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=0, atol=0, msg=name)
    sampled = FastVisionDataCollator(shared_model_of(family), processor, video_options=VideoOptions(num_frames=9))
    assert torch.equal(sampled(samples)["input_ids"], expected["input_ids"])  # 4 frames are there
    with pytest.raises(ConfigError, match="every frame to one size"):
        FastVisionDataCollator(shared_model_of(family), processor, video_options=VideoOptions(max_pixels=9999))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asked", [{"num_frames": 4}, {"fps": 2.0}])
def test_frames_are_sampled_as_the_family_does(family, asked, shared_model_of, processor_of, tell, film):
    processor = processor_of(family)
    samples = [tell(film(12, seed=3), fps=4.0)]
    expected = stock(processor, samples, do_sample_frames=True, **{"fps": None, **asked})
    batch = FastVisionDataCollator(shared_model_of(family), processor, video_options=VideoOptions(**asked))(samples)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])
    assert batch["video_grid_thw"][0, 0] == (2 if "num_frames" in asked else 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_bounded_when_asked(family, shared_model_of, processor_of, tell):
    processor, samples = processor_of(family), [tell()]
    low, high = (4 * 28 * 28, 6 * 28 * 28) if family != "qwen3_vl" else (16 * 32 * 32, 24 * 32 * 32)
    options = VideoOptions(min_pixels=low, max_pixels=high)
    batch = FastVisionDataCollator(shared_model_of(family), processor, video_options=options)(samples)
    expected = stock(processor, samples, size={"shortest_edge": low, "longest_edge": high})
    assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])
    plain = FastVisionDataCollator(shared_model_of(family), processor)(samples)
    one_sided = VideoOptions(max_pixels=low)
    small = FastVisionDataCollator(shared_model_of(family), processor, video_options=one_sided)(samples)
    assert len(small["pixel_values_videos"]) <= len(plain["pixel_values_videos"])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_videos_train_the_same(family, shared_model_of, processor_of, tell, film, ask):
    model, processor = shared_model_of(family), processor_of(family)
    samples = [tell(), ask(images=1), tell(film(6, seed=4), fps=0.7, answer="blue")]
    padded = FastVisionDataCollator(model, processor)(samples)
    packed = FastVisionDataCollator(model, processor, packing=True)(samples)
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).loss, model(**padded).loss, rtol=1e-5, atol=0)


def test_every_form_of_a_video_is_the_same(shared_model_of, processor_of, film, tell):
    processor = processor_of("qwen2_5_vl")
    collator = pickle.loads(pickle.dumps(FastVisionDataCollator(shared_model_of("qwen2_5_vl"), processor)))
    frames = film()
    expected = collator([tell(frames)])
    pixels = array(frames)
    said = {"role": "assistant", "content": "seven pages"}
    marked = [{"role": "user", "content": "<video>What?"}, said]
    unmarked = [{"role": "user", "content": "What?"}, said]
    for sample in (
        tell(pixels),
        tell(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
        tell(list(pixels)),
        {"messages": marked, "videos": [{"frames": frames, "fps": 2}]},
        {"messages": unmarked, "video": {"video": pixels, "fps": 2.0}},
    ):
        batch = collator([sample])
        for name in ("input_ids", "labels", "pixel_values_videos", "position_ids"):
            assert torch.equal(batch[name], expected[name]), name


def test_tokens_are_counted(shared_model_of, processor_of, tell, film):
    for family in FAMILIES:
        collator = FastVisionDataCollator(shared_model_of(family), processor_of(family))
        samples = [tell(), tell(film(7, (90, 40)), fps=0.5)]
        made = [int(collator([sample])["attention_mask"].sum()) for sample in samples]
        assert collator.token_counter().lengths(samples) == made


def test_truncation_leaves_videos_whole(shared_model_of, processor_of, tell):
    parts = shared_model_of("qwen3_vl"), processor_of("qwen3_vl")
    whole = FastVisionDataCollator(*parts)([tell(answer="word " * 30)])
    media_end = int(torch.isin(whole["input_ids"][0], torch.tensor(sorted(parts[1].video_token_ids))).nonzero()[-1])
    collator = FastVisionDataCollator(*parts, max_seq_length=media_end + 12)
    cut = collator([tell(answer="word " * 30)])
    assert torch.equal(cut["pixel_values_videos"], whole["pixel_values_videos"])
    assert collator.overflow_counts.truncated == 1
    with pytest.raises(DataError, match="every sample of a batch"):
        FastVisionDataCollator(*parts, max_seq_length=media_end - 3)([tell(answer="word " * 30)])


def reader(processor, **options):
    return VideoReader(processor, ImageReader(), VideoOptions(**options) if options else None)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ([], "no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        (np.zeros((4, 4, 3), np.uint8), "shape (4, 4, 3)"),
        (np.full((2, 8, 8, 3), np.nan), "NaN"),
        (17, "int"),
        ({"frames": [1], "path": "a"}, "give one"),
        ({"fps": 2}, "none of"),
        ({"frames": np.zeros((2, 8, 8, 3), np.uint8), "fps": -1}, "fps=-1"),
        (["missing.png"], "missing.png"),
        (b"not a video", "torchcodec|corrupt"),
        ("missing.mp4", "torchcodec|not there"),
        ("https://example.com/a.mp4", "torchcodec|not fetched"),
    ],
)
def test_bad_videos_get_one_sentence(source, part, processor_of):
    with pytest.raises((DataError, MissingExtraError)) as caught:
        reader(processor_of("qwen2_vl")).read(source)
    assert any(piece in str(caught.value) for piece in part.split("|"))
    assert "\n" not in str(caught.value)


def test_frames_must_be_of_one_size_and_tell_their_rate(processor_of, picture, film, caplog):
    processor = processor_of("qwen2_5_vl")
    with pytest.raises(DataError, match="60×60, 70×60"):
        reader(processor).read([picture(60, 60), picture(70, 60)])
    with pytest.raises(DataError, match="does not tell its own rate"):
        reader(processor, fps=1.0).read(film(8))
    assert reader(processor, num_frames=8).look(film(5))["frames_indices"] == [0, 1, 2, 3]  # 8 are asked, 5 there
    with pytest.raises(DataError, match="cannot be sampled"):
        reader(processor, fps=9.0).read({"frames": film(1), "fps": 1})
    one = reader(processor)
    with caplog.at_level(logging.WARNING, logger="fvlm_vision"):
        one.read(film())
        one.read(film())
    assert [record.message for record in caplog.records] == [
        "A video does not tell its rate: 24 frames a second are assumed (said once); give its 'fps'."
    ]


def test_families_without_videos_refuse_them(shared_model_of, processor_of, tell):
    parts = shared_model_of("mllama"), processor_of("mllama")
    with pytest.raises(DataError, match=r"^sample 0 of the batch: .*takes no videos|refuses the conversation"):
        FastVisionDataCollator(*parts)([tell()])
    with pytest.raises(ConfigError, match="takes no videos"):
        FastVisionDataCollator(*parts, video_options=VideoOptions(num_frames=4))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"fps": 0}, "fps=0"),
        ({"fps": "2"}, "fps='2'"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"fps": 1, "num_frames": 4}, "both"),
        ({"min_pixels": 5, "max_pixels": 4}, "min_pixels=5"),
    ],
)
def test_bad_options_are_refused(options, part):
    with pytest.raises(ConfigError) as caught:
        VideoOptions(**options)
    assert part in str(caught.value)
