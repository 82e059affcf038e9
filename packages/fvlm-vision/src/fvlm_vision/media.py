"""One image of a sample, in whatever form it came, as an upright 8-bit RGB `PIL.Image`.

What is done to the pixels, and nothing else: the EXIF rotation is applied; transparency is put on white; 16-bit greys
are divided by 257; other modes (palette, CMYK, grey, …) are converted by Pillow; of an animation the first frame is
taken and the log says so once. The size never changes here: see `fvlm_vision.resize`.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fvlm_core.errors import DataError
from fvlm_vision.fetch import FetchLimits, fetch, shown
from fvlm_vision.png import decode_plain

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

MAX_IMAGE_PIXELS = 89_478_485
"""Default limit on width × height, the size above which Pillow warns of a decompression bomb."""

_ANIMATED_FORMATS = frozenset({"GIF", "WEBP", "PNG"})  # a second "frame" of MPO or TIFF is a depth map or a page
_SOURCE_KEYS = ("image", "bytes", "path", "url", "base64", "image_url")


class ImageReader:
    """Reads images with one set of limits. Picklable, so that it travels into dataloader workers.

    Args:
        max_image_pixels: refuse images with more pixels (width × height) than this, before decoding them.
        allow_urls: whether `http://` and `https://` sources are fetched; any other scheme is always refused.
        url_limits: size and time limits of a fetch.
    """

    def __init__(
        self,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        allow_urls: bool = False,
        url_limits: FetchLimits | None = None,
    ) -> None:
        self.max_image_pixels = max_image_pixels
        self.allow_urls = allow_urls
        self.url_limits = url_limits or FetchLimits()
        self._animation_noted = False

    def read(self, source: Any) -> Image.Image:
        """Return `source` as an RGB image.

        Args:
            source: a `PIL.Image`, a path, a data URI, encoded bytes, base64 text in `{"base64": …}`, a numpy array or
                torch tensor (H×W, H×W×C or C×H×W with 1, 3 or 4 channels; 8-bit, 16-bit unsigned, or floats from 0 to
                1), a mapping with one of `image`, `bytes`, `path`, `url`, `base64`, or an HTTP(S) address.

        Returns:
            An image of mode RGB with at least one pixel.

        Raises:
            DataError: the source is missing, corrupt, of an unknown kind, too large, or an address that is not allowed.
        """
        try:
            return self._upright_rgb(self._open(source))
        except Image.DecompressionBombError as error:
            raise DataError(
                f"an image is larger than Pillow's own limit ({error}); raise PIL.Image.MAX_IMAGE_PIXELS as well as "
                "max_image_pixels, or shrink the file."
            ) from error

    def size(self, source: Any) -> tuple[int, int]:
        """Return the (width, height) that `read` would give, in pixels; of encoded images the header alone is read.

        Raises:
            DataError: as `read`, as far as the header tells.
        """
        return _upright_size(self._open(source, decode=False))

    def _open(self, source: Any, decode: bool = True) -> Image.Image:
        if isinstance(source, Image.Image):
            return source
        if isinstance(source, Mapping):
            return self._open(_source_in(source), decode)
        if isinstance(source, str):
            return self._open_text(source, decode)
        if isinstance(source, os.PathLike):
            return self._decode_file(Path(source), decode)
        if isinstance(source, bytes | bytearray | memoryview):
            return self._decode(bytes(source), f"{len(source)} bytes", decode)
        pixels = _as_array(source)
        if pixels is not None:
            return self._from_array(pixels, channels_first=not isinstance(source, np.ndarray))
        raise DataError(
            f"an image is given as {type(source).__name__}; give a PIL image, a path, bytes, a data URI or an array."
        )

    def _open_text(self, text: str, decode: bool) -> Image.Image:
        scheme, separator, rest = text.partition(":")
        scheme = scheme.lower()
        if separator and scheme == "data":
            return self._decode(_data_uri(rest), "a data URI", decode)
        if separator and rest.startswith("//"):
            if scheme not in ("http", "https"):
                raise DataError(
                    f"the image address {text!r} has the scheme {scheme!r}, which is never opened; give a plain path."
                )
            if not self.allow_urls:
                raise DataError(
                    f"the image address {shown(text)} is not fetched; pass allow_urls=True, or download it first."
                )
            return self._decode(fetch(text, self.url_limits), f"at {shown(text)}", decode)
        return self._decode_file(Path(text), decode)

    def _decode_file(self, path: Path, decode: bool) -> Image.Image:
        try:
            encoded = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(f"the image file {str(path)!r} cannot be read ({cause}); correct the path.") from error
        return self._decode(encoded, repr(str(path)), decode)

    def _decode(self, encoded: bytes, name: str, decode: bool) -> Image.Image:
        if not encoded:
            raise DataError(f"the image {name} is empty; replace it or drop the sample.")
        try:
            image = Image.open(io.BytesIO(encoded))
            self.check_size(image.size)  # the header alone has been read: nothing large is allocated yet
            if decode:
                self._note_animation(image, name)
                plain = decode_plain(encoded, image)
                if plain is not None:
                    return plain
                image.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            # Of a file that it does not know Pillow says only where in memory it lies.
            reason = "" if isinstance(error, UnidentifiedImageError) else f" ({_one_line(error)})"
            raise DataError(
                f"the image {name} is corrupt or of an unknown format{reason}; replace it or drop the sample."
            ) from error
        return image

    def _note_animation(self, image: Image.Image, name: str) -> None:
        if self._animation_noted or image.format not in _ANIMATED_FORMATS or not getattr(image, "is_animated", False):
            return
        self._animation_noted = True
        logger.warning("the image %s is animated: its first frame is used (for any other too; said once).", name)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise a `DataError` unless an image of this (width, height) has pixels, and not too many of them."""
        width, height = size
        if width < 1 or height < 1:
            raise DataError(f"an image of {width}×{height} pixels has nothing in it; replace it or drop the sample.")
        if width * height > self.max_image_pixels:
            raise DataError(
                f"an image of {width}×{height} pixels is over the limit of {self.max_image_pixels} pixels; shrink it, "
                "or raise max_image_pixels."
            )

    def _upright_rgb(self, image: Image.Image) -> Image.Image:
        self.check_size(image.size)
        try:
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)  # it would copy any other image as well
            return _to_rgb(image)
        except (OSError, SyntaxError, ValueError, EOFError) as error:  # a lazy PIL image decodes only now
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"an image cannot be decoded ({_one_line(error)}); replace it or drop the sample."
            ) from error

    def _from_array(self, pixels: NDArray[Any], channels_first: bool) -> Image.Image:
        if 0 in pixels.shape:
            raise DataError(f"an image array of shape {pixels.shape} has nothing in it; replace it or drop the sample.")
        pixels = _channels_last(pixels, channels_first)
        self.check_size((pixels.shape[1], pixels.shape[0]))
        pixels = _to_uint8(pixels)
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if on_its_side else (width, height)


def _source_in(block: Mapping[str, Any]) -> Any:
    """Return what a mapping such as `{"path": …}` or `{"type": "image", "url": …}` points to."""
    given = [key for key in _SOURCE_KEYS if block.get(key) is not None]
    if "bytes" in given:  # datasets' Image feature: the path beside the bytes is only where they once came from
        return block["bytes"]
    if not given:
        raise DataError(f"an image mapping has none of {', '.join(_SOURCE_KEYS)} (it has {sorted(map(str, block))}).")
    if len(given) > 1:
        raise DataError(f"an image mapping names more than one source ({', '.join(given)}); keep one.")
    value = block[given[0]]
    if given[0] == "base64":
        return _from_base64(value)
    return value


def _data_uri(rest: str) -> bytes:
    header, comma, payload = rest.partition(",")
    if not comma or not header.endswith(";base64"):
        raise DataError("an image data URI is not of the form data:image/…;base64,…; encode the image in base64.")
    return _from_base64(payload)


def _from_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"an image's base64 text is broken ({_one_line(error)}); encode the image again.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # "I", "I;16", …: what Pillow makes of 16-bit greys
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"an image of mode {image.mode} has values outside 0…65535; rescale it to 8 or 16 bits.")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _as_array(source: Any) -> NDArray[Any] | None:
    """Return numpy's view of an array or tensor, or None when `source` is neither."""
    if isinstance(source, np.ndarray):
        return source
    import torch  # here: reading a file needs no torch

    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return None


def _channels_last(pixels: NDArray[Any], channels_first: bool) -> NDArray[Any]:
    """Return the array as H×W×C. A shape that fits both layouts is read as its library writes images: torch C×H×W."""
    if pixels.ndim == 2:
        return pixels[:, :, None]
    if pixels.ndim == 3:
        fits_first, fits_last = pixels.shape[0] in (1, 3, 4), pixels.shape[-1] in (1, 3, 4)
        if fits_first and (channels_first or not fits_last):
            return np.moveaxis(pixels, 0, -1)
        if fits_last:
            return pixels
    raise DataError(f"an image array has the shape {pixels.shape}; give H×W, H×W×C or C×H×W with 1, 3 or 4 channels.")


def _to_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return (pixels // 257).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.floating):
        if not np.isfinite(pixels).all():
            raise DataError("an image array holds NaN or infinite values; repair it or drop the sample.")
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 1:
            raise DataError(
                f"a float image array runs from {low:g} to {high:g}; scale it to 0…1, or pass 8-bit integers."
            )
        return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.integer):
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 255:
            raise DataError(f"an integer image array runs from {low} to {high}; bring it to 0…255.")
        return pixels.astype(np.uint8)
    raise DataError(f"an image array has the dtype {pixels.dtype}; give 8-bit integers or floats from 0 to 1.")


def _one_line(error: BaseException, limit: int = 120) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
