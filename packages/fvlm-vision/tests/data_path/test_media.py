from __future__ import annotations

import base64
import http.server
import io
import logging
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.fetch import FetchLimits
from fvlm_vision.media import ImageReader


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(source: object, **options: object) -> np.ndarray:
    image = ImageReader(**options).read(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_every_kind_of_source_gives_the_same_pixels(picture, tmp_path):
    image = picture(17, 11)
    expected = np.asarray(image)
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    tensor = torch.from_numpy(expected.copy()).permute(2, 0, 1)
    sources = [
        image,
        str(path),
        path,
        data,
        bytearray(data),
        "data:image/png;base64," + base64.b64encode(data).decode(),
        {"base64": base64.b64encode(data).decode()},
        {"bytes": data, "path": "where/it/was.png"},
        {"bytes": None, "path": str(path)},
        {"type": "image", "image_url": {"url": str(path)}},
        expected,
        expected.transpose(2, 0, 1),
        tensor,
        tensor.float() / 255,
        expected.astype(np.float32) / 255,
        expected.astype(np.int64),
        expected.astype(np.uint16) * 257,
    ]
    for source in sources:
        np.testing.assert_array_equal(read(source), expected)


TURNS = {  # of the pixels that are stored, by EXIF orientation, to the upright picture
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_is_applied(picture, orientation):
    image = picture(8, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = TURNS[orientation](np.asarray(image))
    data = encoded(image, exif=exif)
    np.testing.assert_array_equal(read(data), expected)
    assert ImageReader().size(data) == expected.shape[1::-1]


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(read(image), [[[255, 255, 255], [10, 20, 30]]])
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([1, 2, 3])
    palette.info["transparency"] = 0
    np.testing.assert_array_equal(read(palette), [[[255, 255, 255]]])


def test_other_modes_become_rgb():
    grey16 = Image.fromarray(np.array([[0, 32895, 32896, 65535]], dtype=np.uint16))
    np.testing.assert_array_equal(read(encoded(grey16))[0, :, 0], [0, 127, 128, 255])
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    red, green, blue = read(encoded(cmyk, "JPEG", quality=100))[0, 0]
    assert red > 245
    assert max(green, blue) < 10
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 8, 7])
    np.testing.assert_array_equal(read(encoded(palette)), [[[9, 8, 7]]])
    np.testing.assert_array_equal(read(np.array([[True, False]]))[0, :, 0], [255, 0])


def test_an_animation_gives_its_first_frame_and_says_so_once(caplog):
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    reader = ImageReader()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert reader.read(data).getpixel((0, 0)) == (255, 0, 0)
    assert sum("animated" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("missing/file.png", "missing/file.png"),
        ("a\0b", "cannot be read"),
        (b"", "empty"),
        (b"not an image", r"corrupt or of an unknown format; replace"),
        ("data:image/png;base64,@@@", "base64"),
        ("data:text/plain,hello", "data URI"),
        ("file:///etc/passwd", "'file'"),
        ("ftp://host/a.png", "'ftp'"),
        ("https://host/a.png", "allow_urls=True"),
        ({"path": None}, "none of"),
        ({"path": "a", "url": "b"}, "more than one"),
        (42, "int"),
        (np.zeros((0, 4, 3), np.uint8), "nothing in it"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), 200.0), "0…1"),
        (np.full((4, 4, 3), -1), "0…255"),
        (np.zeros((6, 4, 5), np.uint8), "shape"),
        (np.zeros((4, 4), complex), "dtype"),
        (Image.new("RGB", (0, 4)), "nothing in it"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(source, part):
    with pytest.raises(DataError) as caught:
        ImageReader().read(source)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(picture):
    data = encoded(picture(64, 64))
    with pytest.raises(DataError, match="corrupt"):
        ImageReader().read(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot be decoded"):  # a lazily opened PIL image
        ImageReader().read(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_a_bomb_is_refused_before_it_is_decoded():
    with pytest.raises(DataError, match=r"20000×20000|Pillow's own limit"):
        ImageReader().read(encoded(Image.new("1", (20_000, 20_000))))  # 50 KB that would be 1.2 GB
    header = encoded(Image.new("1", (10_000, 9_000)))[:200]  # decoding it would say that it is corrupt
    with pytest.raises(DataError, match="10000×9000 pixels is over the limit"):
        ImageReader().read(header)
    with pytest.raises(DataError, match="over the limit of 15"):
        ImageReader(max_image_pixels=15).read(Image.new("RGB", (4, 4)))
    assert ImageReader(max_image_pixels=16).read(Image.new("RGB", (4, 4))).size == (4, 4)


class _Server(http.server.BaseHTTPRequestHandler):
    data = b""

    def do_GET(self) -> None:
        if self.path == "/to-file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                try:
                    self.wfile.write(b"x")
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.05)
        elif self.path == "/headers":
            for _ in range(50):
                try:
                    self.wfile.write(b"x")  # a status line that never ends
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.05)
        elif self.path.partition("?")[0] == "/broken":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"no image")
        elif self.path == "/a.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.data)
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address(picture) -> Iterator[str]:
    _Server.data = encoded(picture(9, 9))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_only_when_allowed_and_within_limits(address, picture, shared_model_of, processor_of):
    expected = np.asarray(picture(9, 9))
    np.testing.assert_array_equal(read(f"{address}/a.png", allow_urls=True), expected)
    np.testing.assert_array_equal(read({"url": f"{address}/moved"}, allow_urls=True), expected)
    for path, limits, part in [
        ("/missing", FetchLimits(), "404"),
        ("/to-file", FetchLimits(), "not HTTP"),
        ("/a.png", FetchLimits(max_bytes=100), "larger than 100 bytes"),
        ("/drip", FetchLimits(seconds=0.3), "longer than 0.3 s"),
        ("/headers", FetchLimits(seconds=0.3), "longer than 0.3 s"),
        ("/broken", FetchLimits(), "corrupt"),
    ]:
        with pytest.raises(DataError, match=part):
            ImageReader(allow_urls=True, url_limits=limits).read(address + path)
    with pytest.raises(DataError, match="allow_urls"):
        ImageReader().read(f"{address}/a.png")
    images = {"allow_urls": True, "url_limits": FetchLimits(max_bytes=100)}
    sample = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": f"{address}/a.png"}]},
            {"role": "assistant", "content": "42"},
        ]
    }
    with pytest.raises(DataError, match="larger than 100 bytes"):
        FastVisionDataCollator(shared_model_of("qwen2_vl"), processor_of("qwen2_vl"), **images)([sample])
    for refused in ({"max_bytes": 0}, {"seconds": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(refused))):
            FetchLimits(**refused)


def test_what_may_be_secret_in_an_address_is_not_told(address):
    secret = address.replace("//", "//me:pass@") + "/broken?token=hf_123"
    for options in ({}, {"allow_urls": True}):
        with pytest.raises(DataError) as caught:
            ImageReader(**options).read(secret)
        assert "/broken?…" in str(caught.value)
        assert not any(word in str(caught.value) for word in ("me:", "pass@", "hf_123"))
