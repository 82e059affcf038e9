"""One video of a sample, in whatever form it came, as frames of one size and the times they belong to.

Which frames are taken is decided by the family's own sampling, so that a list of frames, an array and a file give what
a direct call of the processor gives.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fvlm_core.errors import ConfigError, DataError, MissingExtraError
from fvlm_vision.arguments import positive
from fvlm_vision.fetch import fetch, shown

if TYPE_CHECKING:
    from fvlm_vision.media import ImageReader

logger = logging.getLogger(__name__)

_MOST_FRAMES = 768  # of a file, where the processor has no limit of its own
_SOURCE_KEYS = ("video", "frames", "bytes", "path", "url", "video_url")


@dataclass(frozen=True)
class VideoOptions:
    """What is taken of videos. Nothing is changed of what is None: the processor's own settings hold.

    Args:
        fps: frames a second to take. None takes every frame of a list or an array, and of a file what the processor
            takes by itself.
        num_frames: how many frames to take, spread evenly; not beside `fps`.
        min_pixels, max_pixels: the bounds of the video processor's own resizing, which is the only one: pixels of a
            frame for Qwen2-VL and Qwen2.5-VL, of all frames together for Qwen3-VL.

    Raises:
        ConfigError: a value is not positive, or two contradict each other.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "min_pixels", "max_pixels"):
            positive(name, getattr(self, name))
        if self.fps is not None and not (isinstance(self.fps, int | float) and self.fps > 0):
            raise ConfigError(f"fps={self.fps!r} is no positive number of frames a second.")
        if self.fps is not None and self.num_frames is not None:
            raise ConfigError(f"fps={self.fps} and num_frames={self.num_frames} both say how many frames; give one.")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}; swap them.")


@dataclass(frozen=True)
class Video:
    """The frames that are taken of a video.

    Args:
        frames: shape (frames, 3, height, width), uint8.
        metadata: what transformers calls `VideoMetadata`: `total_num_frames`, `fps` and `frames_indices` of the whole
            video, `height`, `width`, `duration`.
    """

    frames: torch.Tensor
    metadata: dict[str, Any]


class VideoReader:
    """Reads videos for one family. Picklable.

    Args:
        processor: of the family.
        images: reads frames, with its limits.
        options: which frames are taken.

    Raises:
        ConfigError: options are given for a family that takes no videos, or bounds for one whose frames have one size.
    """

    def __init__(self, processor: Any, images: ImageReader, options: VideoOptions | None) -> None:
        self.processor: Any = processor.video_processor if "video_processor" in processor.get_attributes() else None
        self.images = images
        self.options = options or VideoOptions()
        self._pair: int = getattr(self.processor, "temporal_patch_size", None) or 1  # frames that become one
        self._most: int = getattr(self.processor, "max_frames", _MOST_FRAMES)
        self._timed = "second_per_grid_ts" in processor.model_input_names
        self._rate_noted = False
        if self.processor is None and options is not None:
            raise ConfigError(f"video_options are given, and {type(processor).__name__} takes no videos; drop them.")
        bounded = self.options.min_pixels is not None or self.options.max_pixels is not None
        size = dict(self.processor.size) if bounded and self.processor is not None else {}
        if bounded and not (size.get("shortest_edge") and size.get("longest_edge")):
            raise ConfigError(
                f"{type(self.processor).__name__} brings every frame to one size, so min_pixels and max_pixels of "
                "video_options do nothing; leave them out."
            )

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the video processor, besides the metadata."""
        kwargs: dict[str, Any] = {"do_sample_frames": False, "input_data_format": "channels_first"}
        if self.options.min_pixels is None and self.options.max_pixels is None:
            return kwargs
        own = dict(self.processor.size)
        low, high = self.options.min_pixels, self.options.max_pixels
        low = min(own["shortest_edge"], high or own["shortest_edge"]) if low is None else low
        high = max(own["longest_edge"], low) if high is None else high
        return kwargs | {"size": {"shortest_edge": low, "longest_edge": high}}

    def read(self, source: Any) -> Video:
        """Return the frames that are taken of `source`.

        Args:
            source: a list of images (in any form that `ImageReader` reads), an array or tensor of frames
                (T×H×W×C or T×C×H×W), a file as a path, bytes or an HTTP(S) address, or a mapping with one of these as
                `video`, `frames`, `path`, `bytes` or `url`, and `fps`: beside frames the rate that they have, beside a
                file the frames a second that are taken of it, whatever the options say.

        Raises:
            DataError: the family takes no videos; the video is missing, corrupt, empty or too large; its frames differ
                in size; or nothing tells its rate.
            MissingExtraError: a file is given and torchcodec is not installed.
        """
        content, rate = self._content(source)
        if isinstance(content, list):
            return self._frames(content, rate)
        decoder, name = self._decoder(content)
        metadata = self._of_file(decoder, name, rate)
        with _told(name):
            return Video(decoder.get_frames_at(metadata["frames_indices"]).data, metadata)

    def look(self, source: Any) -> dict[str, Any]:
        """Return the metadata that `read` would give; of a list the first frame alone is opened, of a file none.

        Raises:
            DataError: as `read`, as far as that tells.
            MissingExtraError: as `read`.
        """
        content, rate = self._content(source)
        if isinstance(content, list):
            return _metadata(self.images.size(content[0]), len(content), rate, self._taken(len(content), rate))
        return self._of_file(*self._decoder(content), rate)

    def _content(self, source: Any) -> tuple[Any, float | None]:
        """Return a list of frames, or what holds a file; and the rate that stands beside it."""
        if self.processor is None:
            raise DataError("this model takes no videos; give the frames as images, or drop the sample.")
        rate = None
        if isinstance(source, Mapping):
            source, rate = _source_in(source)
        if isinstance(source, str | bytes | bytearray | memoryview | os.PathLike):
            return source, rate
        if not isinstance(source, list | tuple | np.ndarray | torch.Tensor):
            raise DataError(
                f"a video is given as {type(source).__name__}; give a list of frames, an array of frames or a file."
            )
        if not isinstance(source, list | tuple) and source.ndim != 4:
            raise DataError(f"a video array has the shape {tuple(source.shape)}; give frames × height × width × 3.")
        if len(source) == 0:
            raise DataError("a video has no frames; drop the sample.")
        return list(source), rate

    def _frames(self, frames: list[Any], rate: float | None) -> Video:
        taken = self._taken(len(frames), rate)
        images = [self.images.read(frames[number]) for number in taken]
        sizes = {image.size for image in images}
        if len(sizes) > 1:
            listed = ", ".join(f"{width}×{height}" for width, height in sorted(sizes)[:3])
            raise DataError(f"the frames of a video differ in size ({listed}); bring them to one size.")
        if rate is None and self._timed and not self._rate_noted:
            self._rate_noted = True
            logger.warning(
                "A video does not tell its rate: 24 frames a second are assumed (said once); give its 'fps'."
            )
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
        return Video(pixels.contiguous(), _metadata(images[0].size, len(frames), rate, taken))

    def _of_file(self, decoder: Any, name: str, asked: float | None) -> dict[str, Any]:
        """Return the metadata of a file, with the frames that are taken of it: `asked` a second, where it is given."""
        about = decoder.metadata
        total, rate = about.num_frames, about.average_fps
        if not total or not rate:
            raise DataError(f"the video {name} does not tell its frames and their rate; encode it again.")
        self.images.check_size((about.width, about.height))
        taken = self._taken(total, rate, asked, always=bool(self.processor.do_sample_frames))
        if len(taken) > self._most:
            raise DataError(
                f"the video {name} has {total} frames, over the {self._most} that its processor takes "
                "at most; ask for fewer with fps or num_frames in video_options."
            )
        return _metadata((about.width, about.height), total, rate, taken)

    def _taken(self, total: int, rate: float | None, asked: float | None = None, always: bool = False) -> list[int]:
        """Return the numbers of the frames that are taken: all, or by the family's own rule where that is asked for."""
        from transformers.video_utils import VideoMetadata

        fps, number = (self.options.fps, self.options.num_frames) if asked is None else (asked, None)
        if fps is None and number is None and not always:
            return list(range(total))
        if fps is not None and rate is None:
            raise DataError(
                f"{fps} frames a second are asked for and a video does not tell its own rate; put 'fps' beside its "
                "frames, or ask for num_frames."
            )
        chosen: dict[str, Any] = {} if fps is None else {"fps": fps}
        if number is not None:  # the families round up to whole pairs, which a short video may not have
            chosen = {"num_frames": number if number < total else total - total % self._pair}
        try:
            indices = self.processor.sample_frames(metadata=VideoMetadata(total, fps=rate), **chosen)
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(f"{total} frames of a video cannot be sampled ({error}).") from error
        return [int(index) for index in indices]

    def _decoder(self, source: Any) -> tuple[Any, str]:
        """Return a decoder of a file, and what messages call the file."""
        try:
            from torchcodec.decoders import VideoDecoder

            _check_ffmpeg()
        except (ImportError, RuntimeError, OSError) as error:  # it may be there and find no FFmpeg, or another torch
            raise MissingExtraError(
                "Video files need FFmpeg's libraries and a torchcodec that fits torch (0.10 for torch 2.10, 0.11 or "
                "newer for newer ones): pip install fvlm-vision[video], or give a list of frames "
                f"({' '.join(str(error).split())[:80]})."
            ) from error
        name, stored = self._stored(source)
        with _told(name):
            return VideoDecoder(stored, dimension_order="NCHW"), name

    def _stored(self, source: Any) -> tuple[str, Any]:
        if not isinstance(source, str | os.PathLike):
            return f"of {len(source)} bytes", bytes(source)
        text = os.fspath(source)
        scheme, separator, rest = text.partition(":")
        if separator and rest.startswith("//"):
            if scheme.lower() not in ("http", "https") or not self.images.allow_urls:
                raise DataError(
                    f"the video address {shown(text)} is not fetched; pass allow_urls=True, or download it."
                )
            return f"at {shown(text)}", fetch(text, self.images.url_limits)
        if not Path(text).is_file():
            raise DataError(f"the video file {text!r} is not there; correct the path.")
        return repr(text), text


def _check_ffmpeg() -> None:
    """Raise an ImportError where torchcodec is here without FFmpeg: newer ones say so only when they decode."""
    import torchcodec

    if torchcodec.ffmpeg_major_version is None:
        raise ImportError("torchcodec finds no FFmpeg")


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what a decoder raises into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"the video {name} is corrupt or of an unknown format ({reason}); replace it.") from error


def _source_in(block: Mapping[str, Any]) -> tuple[Any, float | None]:
    given = [key for key in _SOURCE_KEYS if block.get(key) is not None]
    if len(given) != 1 and "bytes" not in given:
        raise DataError(f"a video mapping has {given or 'none'} of {', '.join(_SOURCE_KEYS)}; give one.")
    rate = block.get("fps")
    if rate is not None and not (isinstance(rate, int | float) and rate > 0):
        raise DataError(f"a video has fps={rate!r}; give the frames a second of what is beside it.")
    return block["bytes" if "bytes" in given else given[0]], rate


def _metadata(size: tuple[int, int], total: int, rate: float | None, taken: list[int]) -> dict[str, Any]:
    width, height = size
    return {
        "total_num_frames": total,
        "fps": rate,
        "frames_indices": taken,
        "height": height,
        "width": width,
        "duration": None if rate is None else total / rate,
    }
