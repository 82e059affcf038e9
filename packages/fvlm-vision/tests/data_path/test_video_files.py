"""Video files, decoded by torchcodec: the stock processor's batches, and what is said of files that cannot be read.

FVLM_VIDEO=1 says that torchcodec and FFmpeg are here: then nothing is passed over. CI installs both, or fails.
"""

from __future__ import annotations

import http.server
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from fvlm_core.errors import DataError, MissingExtraError
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.fetch import FetchLimits
from fvlm_vision.media import ImageReader
from fvlm_vision.rows import NumberedRows
from fvlm_vision.video import VideoOptions, VideoReader

CLIP = Path(__file__).parent / "clip.mp4"  # 12 frames of 56 × 56 at 4 a second; frame n is grey, of 16 + 16 n
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")


def can_decode() -> bool:
    """Tell whether torchcodec is installed, fits torch, and finds FFmpeg."""
    if importlib.util.find_spec("torchcodec") is None:
        return False
    try:
        import torchcodec
    except (ImportError, RuntimeError, OSError):
        return False
    return torchcodec.ffmpeg_major_version is not None  # newer ones can be imported without


decodes = pytest.mark.skipif(
    os.environ.get("FVLM_VIDEO") != "1" and not can_decode(), reason="no torchcodec with FFmpeg on this machine"
)


def reader(processor, images=None, **options):
    return VideoReader(processor, images or ImageReader(), VideoOptions(**options) if options else None)


def about(video, answer="seven pages"):
    blocks = [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]}


@decodes
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asked", [{}, {"num_frames": 4}, {"fps": 2.0}])
def test_a_file_gives_the_batch_of_the_stock_processor(family, asked, shared_model_of, processor_of):
    processor, sample = processor_of(family), about(str(CLIP))
    options = VideoOptions(**asked) if asked else None
    batch = FastVisionDataCollator(shared_model_of(family), processor, video_options=options)([sample])
    taken = {"do_sample_frames": True, "fps": None, **asked} if asked else {}
    text = processor.apply_chat_template(sample["messages"], tokenize=False)
    expected = processor(text=[text], videos=[[str(CLIP)]], videos_kwargs=taken, return_tensors="pt")
    assert {"pixel_values_videos", "pixel_values"} & set(expected)
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(value)), name


@decodes
def test_every_form_is_decoded_frame_by_frame(processor_of):
    processor = processor_of("qwen2_vl")
    for source in (CLIP, str(CLIP), CLIP.read_bytes(), {"path": str(CLIP)}, {"bytes": CLIP.read_bytes(), "path": "x"}):
        whole = reader(processor).read(source)
        assert whole.metadata["fps"] == 4
        shades = whole.frames.float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(shades, 16 + 16 * torch.arange(12.0), rtol=0, atol=6)


@decodes
def test_frames_are_sampled_as_the_family_or_the_file_says(processor_of):
    whole = reader(processor_of("qwen2_vl")).read(CLIP)
    sampled = reader(processor_of("qwen3_vl")).read(CLIP)  # its processor samples by itself: 2 a second
    assert sampled.metadata["frames_indices"] == [0, 2, 4, 7, 9, 11]
    torch.testing.assert_close(sampled.frames, whole.frames[[0, 2, 4, 7, 9, 11]], rtol=0, atol=0)
    assert reader(processor_of("qwen2_vl"), num_frames=4).look(CLIP)["frames_indices"] == [0, 3, 6, 9]
    own = reader(processor_of("qwen2_vl"), num_frames=4).read({"path": CLIP, "fps": 2})  # of this file alone
    assert own.metadata["frames_indices"] == [0, 2, 4, 6, 8, 10]
    assert own.metadata["fps"] == 4


@decodes
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_decode_and_tokens_are_counted(start, shared_model_of, processor_of, ask):
    collator = FastVisionDataCollator(shared_model_of("qwen3_vl"), processor_of("qwen3_vl"))
    samples = [about(str(CLIP)), about({"path": str(CLIP), "fps": 1}), ask()]
    rows = NumberedRows(samples)
    loader = DataLoader(rows, batch_size=1, num_workers=1, collate_fn=collator, multiprocessing_context=start)
    made = list(loader)
    here = [collator([sample]) for sample in samples]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, here, strict=True))
    assert torch.equal(made[0]["pixel_values_videos"], here[0]["pixel_values_videos"])
    lengths = [batch["input_ids"].shape[1] for batch in here]
    assert collator.token_counter().lengths(samples) == lengths
    assert lengths[0] > lengths[1]


@decodes
def test_broken_and_huge_files_are_refused_by_row(shared_model_of, processor_of, tmp_path):
    whole = CLIP.read_bytes()
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    collator = FastVisionDataCollator(shared_model_of("qwen2_vl"), processor_of("qwen2_vl"))
    for broken in (whole[:200], whole[:800], b"no video", b"", str(tmp_path / "text.mp4")):
        with pytest.raises(DataError, match=r"^row 5: the video .* is corrupt or of an unknown format") as caught:
            collator([NumberedRows([about(str(CLIP))] * 5 + [about(broken)])[5]])
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="not there"):
        collator([about("missing.mp4")])
    with pytest.raises(DataError, match="56×56 pixels is over the limit"):
        reader(processor_of("qwen2_vl"), ImageReader(max_image_pixels=3000)).read(CLIP)


@decodes
def test_a_file_damaged_in_the_middle_is_refused_or_whole(processor_of):
    """FFmpeg hides some damage; what comes must be frames, or one sentence."""
    whole, refused = bytearray(CLIP.read_bytes()), 0
    for place in range(0, len(whole) - 64, 97):
        damaged = bytes(whole[:place] + b"\xff" * 64 + whole[place + 64 :])
        try:
            video = reader(processor_of("qwen2_vl")).read(damaged)
        except DataError:
            refused += 1
            continue
        assert video.frames.shape[0] == len(video.metadata["frames_indices"])
        assert video.frames.dtype == torch.uint8
    assert refused > 0


@pytest.fixture
def address() -> Iterator[str]:
    handler = partial(Quiet, directory=str(CLIP.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{CLIP.name}"
    server.shutdown()
    server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@decodes
def test_addresses_are_fetched_only_when_allowed(address, processor_of):
    processor = processor_of("qwen2_vl")
    allowed = reader(processor, ImageReader(allow_urls=True)).read(address)
    assert torch.equal(allowed.frames, reader(processor).read(CLIP).frames)
    with pytest.raises(DataError, match="allow_urls=True"):
        reader(processor).read(address)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        reader(processor, ImageReader(allow_urls=True, url_limits=FetchLimits(max_bytes=100))).read(address)
    for refused in (f"file://{CLIP}", "ftp://host/a.mp4", "concat://a|b"):
        with pytest.raises(DataError, match="not fetched"):
            reader(processor, ImageReader(allow_urls=True)).read(refused)


@pytest.fixture
def no_torchcodec():
    """Let a test import a torchcodec of its own, and leave none of it to the tests after it."""

    def taken_out():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torchcodec"}

    before = taken_out()
    yield
    taken_out()
    sys.modules.update(before)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('none here')", "none here"),
        ("raise RuntimeError('Could not load libtorchcodec')", "Could not load libtorchcodec"),
        ("raise OSError('Could not load this library')", "Could not load this library"),
        ("VideoDecoder = None", "torchcodec finds no FFmpeg"),
    ],
)
def test_files_need_the_extra_and_what_it_stands_on(code, said, processor_of, tmp_path, no_torchcodec, monkeypatch):
    """No torchcodec, one without FFmpeg, one that was built for another torch."""
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("ffmpeg_major_version = None", encoding="utf-8")
    (tmp_path / "torchcodec" / "decoders.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError) as caught:
        reader(processor_of("qwen2_vl")).read(CLIP)
    for piece in ("pip install fvlm-vision[video]", "FFmpeg", "fits torch", said):
        assert piece in str(caught.value)
    assert "\n" not in str(caught.value)
