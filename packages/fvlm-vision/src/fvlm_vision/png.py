"""The plain PNGs, 8-bit grey or RGB, decoded in less than half of Pillow's time: kornia-rs, whose inflate is quicker.

Pillow reads the header, with its own checks, and decodes whatever is not plain. Where kornia-rs refuses a file, Pillow
is asked as well, so that what a broken file gives, pixels or an error, is Pillow's answer. One thing kornia-rs does not
look at: the checksum within the compressed pixels, beside that of each piece of the file. So a file that was broken
before its pieces got their checksums, on purpose that is, may give pixels where Pillow gives an error.
"""

from __future__ import annotations

import io
import logging
import struct
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_MODES = {"RGB": "rgb", "L": "mono"}
_TOUCHES_PIXELS = ("transparency", "exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""What of a file's information changes the picture: transparency, and where its orientation may stand."""
_GREY_OR_RGB = (b"\x08\x00\x00\x00\x00", b"\x08\x02\x00\x00\x00")
"""The end of a header: 8 bits, the kind of colour, the only compression and filters that there are, not interlaced."""
_HEADER_END, _HEADER = 33, slice(24, 29)


def decode_plain(encoded: bytes, header: Image.Image) -> Image.Image | None:
    """Return the pixels of a plain PNG, or None where Pillow has to decode it.

    Args:
        encoded: the file.
        header: what `Image.open` made of it; not yet decoded, its size already checked.

    Returns:
        An image of mode RGB or L, with the pixels that `header.load()` would give.
    """
    mode = _MODES.get(header.mode)
    if header.format != "PNG" or mode is None or any(name in header.info for name in _TOUCHES_PIXELS):
        return None
    if not _ends_after_its_pixels(encoded):
        return None
    decode = _decoder()
    pixels = None if decode is None else decode(encoded, header.size, mode)
    return None if pixels is None else Image.fromarray(pixels if mode == "rgb" else pixels[..., 0])


@cache
def _decoder() -> Callable[[bytes, tuple[int, int], str], NDArray[np.uint8] | None] | None:
    """Return what decodes a file of a (width, height), or None where no kornia-rs is there that does it as expected."""
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:  # a Python for which it has no wheel yet
        return None

    def decode(encoded: bytes, size: tuple[int, int], mode: str) -> NDArray[np.uint8] | None:
        try:
            return decode_image_png_u8(encoded, (size[1], size[0]), mode)  # type: ignore[no-any-return]
        except Exception as error:
            if type(error) is not Exception:  # the class itself: all that it raises for a file that it cannot decode
                raise
            return None

    tried = io.BytesIO()
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    Image.fromarray(pixels).save(tried, "PNG")
    try:
        if np.array_equal(decode(tried.getvalue(), (4, 2), "rgb"), pixels):  # type: ignore[arg-type]
            return decode
    except (TypeError, ValueError) as error:  # other arguments: its interface is a young one
        logger.warning("This kornia-rs decodes PNGs in another way (%s): Pillow does it all, which is slower.", error)
    return None


def _ends_after_its_pixels(encoded: bytes) -> bool:
    """Tell whether a PNG has 8 bits of grey or RGB, and behind its pixels nothing but its end (no EXIF, no frames)."""
    if encoded[12:16] != b"IHDR" or encoded[_HEADER] not in _GREY_OR_RGB:
        return False
    at, in_pixels = _HEADER_END, False
    while at + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        if in_pixels and kind != b"IDAT":
            return bool(kind == b"IEND")
        in_pixels = in_pixels or kind == b"IDAT"
        at += 12 + length
    return False
