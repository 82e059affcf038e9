"""Plain PNGs come from a quicker decoder: with Pillow's pixels, and Pillow's answer about files that are broken."""

from __future__ import annotations

import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fvlm_core.errors import DataError
from fvlm_vision import media, png
from fvlm_vision.media import ImageReader
from fvlm_vision.png import decode_plain

NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
RGB, GREY = Image.fromarray(NOISE[..., :3]), Image.fromarray(NOISE[..., 0])


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def file_of(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def deep_rgb() -> bytes:
    """16 bits a channel, which Pillow reads as 8 and does not write."""
    rows = b"".join(b"\0" + row.tobytes() for row in NOISE[..., :3].astype(">u2") * 257)
    header = struct.pack(">IIBBBBB", 53, 37, 16, 2, 0, 0, 0)
    return file_of((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def interlaced() -> bytes:
    """Adam7, in one colour: seven passes over an image of 8 × 8."""
    passes = [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]
    rows = b"".join((b"\0" + bytes([9, 80, 200]) * width) * height for width, height in passes)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1)
    return file_of((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def described(**text: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value, zip=True)
    return info


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


def late(image: Image.Image, kind: bytes, data: bytes) -> bytes:
    """A file with one more chunk between its pixels and its end."""
    whole = encoded(image)
    return whole[:-12] + chunk(kind, data) + whole[-12:]


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PLAIN = {
    "RGB": encoded(RGB),
    "grey": encoded(GREY),
    "stored": encoded(RGB, compress_level=0),
    "one pixel": encoded(RGB.crop((0, 0, 1, 1))),
    "with text": encoded(RGB, pnginfo=described(Software="a scanner"), dpi=(300, 300)),
    "with a profile": encoded(GREY, icc_profile=b"no profile that anybody reads"),
    "many pieces": encoded(Image.fromarray(np.tile(NOISE[..., :3], (9, 9, 1)))),
}
PILLOWS = {
    "palette": encoded(RGB.convert("P")),
    "1 bit": encoded(RGB.convert("1")),
    "4 bits of grey": encoded(GREY.quantize(16), bits=4),
    "16 bits of grey": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200)),
    "16 bits of RGB": deep_rgb(),
    "RGB and alpha": encoded(Image.fromarray(NOISE)),
    "grey and alpha": encoded(Image.fromarray(NOISE).convert("LA")),
    "a transparent colour": encoded(RGB, transparency=tuple(NOISE[0, 0, :3].tolist())),
    "a transparent grey": encoded(GREY, transparency=int(NOISE[0, 0, 0])),
    "interlaced": interlaced(),
    "animated": encoded(RGB, save_all=True, append_images=[GREY.convert("RGB")]),
    "turned by EXIF": turned(RGB),
    "turned by EXIF behind the pixels": late(RGB, b"eXIf", turned(RGB).split(b"eXIf")[1][:26]),
    "turned by XMP": encoded(RGB, pnginfo=described(**{"XML:com.adobe.xmp": XMP})),
    "text behind the pixels": late(RGB, b"tEXt", b"Comment\0late"),
    "no end": encoded(RGB)[:-12],
    "cut": encoded(RGB)[:-900],
    "no pixels": file_of((b"IHDR", struct.pack(">IIBBBBB", 5, 5, 8, 2, 0, 0, 0)), (b"IEND", b"")),
    "a GIF": b"GIF89a" + encoded(RGB)[6:],
}


@pytest.fixture
def quick(monkeypatch):
    """What the quicker decoder gave, None where it left a file to Pillow."""
    given_: list[Image.Image | None] = []

    def watched(*arguments):
        given_.append(decode_plain(*arguments))
        return given_[-1]

    monkeypatch.setattr(media, "decode_plain", watched)
    return given_


def answer(source: bytes) -> np.ndarray | str:
    try:
        return np.asarray(ImageReader().read(source))
    except DataError as error:
        return str(error)


def by_pillow(source: bytes) -> np.ndarray | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "decode_plain", lambda *_: None)
        return answer(source)


def same(found: np.ndarray | str, expected: np.ndarray | str) -> bool:
    if isinstance(found, str) or isinstance(expected, str):
        return isinstance(found, str) and isinstance(expected, str) and found == expected
    return np.array_equal(found, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_come_from_it(name, quick):
    found = answer(PLAIN[name])
    assert [one is not None for one in quick] == [True]
    assert same(found, by_pillow(PLAIN[name]))


@pytest.mark.parametrize("name", PILLOWS)
def test_others_are_left_to_pillow(name, quick):
    found = answer(PILLOWS[name])
    assert quick in ([], [None])
    assert same(found, by_pillow(PILLOWS[name]))


def test_a_turned_file_is_turned():
    expected = np.rot90(NOISE[..., :3], -1)
    for name in ("turned by EXIF", "turned by EXIF behind the pixels", "turned by XMP"):
        assert np.array_equal(answer(PILLOWS[name]), expected), name


@pytest.fixture
def asked_anew():
    """The decoder is looked for again, then and afterwards."""
    png._decoder.cache_clear()
    yield
    png._decoder.cache_clear()


def test_without_the_decoder_pillow_does_it_all(monkeypatch, quick, asked_anew):
    monkeypatch.setitem(sys.modules, "kornia_rs.io", None)  # as if it were not installed
    assert np.array_equal(answer(PLAIN["RGB"]), NOISE[..., :3])
    assert quick == [None]


@pytest.mark.parametrize(
    ("decode", "said"),
    [
        (lambda file: None, "positional argument"),
        (lambda file, shape, mode: np.zeros((*shape, 3), np.uint8), ""),
        (lambda file, shape, mode: np.array(None), ""),
    ],
    ids=["other arguments", "other pixels", "no pixels"],
)
def test_a_decoder_of_another_kind_is_not_used(decode, said, monkeypatch, quick, asked_anew, caplog):
    decoder = types.ModuleType("kornia_rs.io")
    decoder.decode_image_png_u8 = decode
    monkeypatch.setitem(sys.modules, "kornia_rs.io", decoder)
    assert np.array_equal(answer(PLAIN["RGB"]), NOISE[..., :3])
    assert quick == [None]
    assert said in caplog.text


def test_a_wrong_checksum_within_the_pixels_is_not_looked_at():
    """The one difference, for files that were made wrong: their pieces have the right checksums."""
    head, pixels = PLAIN["RGB"][:33], zlib.compress(b"".join(b"\0" + row.tobytes() for row in NOISE[..., :3]))
    wrong = head + chunk(b"IDAT", pixels[:-1] + bytes([pixels[-1] ^ 1])) + chunk(b"IEND", b"")
    assert np.array_equal(answer(wrong), NOISE[..., :3])
    assert "broken data stream" in by_pillow(wrong)


def test_too_many_pixels_are_refused_undecoded(quick):
    with pytest.raises(DataError, match="over the limit of 100 pixels"):
        ImageReader(max_image_pixels=100).read(PLAIN["RGB"])
    assert quick == []


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from([*PLAIN, *PILLOWS]),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.none() | st.integers(0, 2**16),
)
def test_broken_files_get_pillows_answer(name, changes, cut):
    file = bytearray({**PLAIN, **PILLOWS}[name])
    for at, value in changes:
        file[at % len(file)] = value
    broken = bytes(file if cut is None else file[: cut % len(file)])
    assert same(answer(broken), by_pillow(broken))
