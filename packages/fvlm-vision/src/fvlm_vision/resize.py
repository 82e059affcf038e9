"""Changing an image's resolution, only when asked, by one resampling.

The size is worked out first (`resize`, then `min_pixels`/`max_pixels`, then the family's patch grid) and the image is
resampled once to it. Snapping to the grid keeps a family whose processor resizes to a grid of its own (the Qwen
families) from resampling a second time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Resize = int | tuple[int, int] | Literal["min", "max"]


@dataclass(frozen=True)
class ResizePolicy:
    """How large images may be.

    Args:
        longest: the longer side is brought down to this many pixels, the aspect ratio kept; never enlarged.
        exact: width and height that every image gets, in pixels.
        min_pixels, max_pixels: bounds on width × height, the aspect ratio kept.
        grid: width and height become multiples of this many pixels; 1 leaves them.
    """

    longest: int | None = None
    exact: tuple[int, int] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    grid: int = 1

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) in pixels that an image of the given size gets."""
        asked = self.longest, self.exact, self.min_pixels, self.max_pixels
        if all(value is None for value in asked):
            return width, height
        w, h = float(width), float(height)
        if self.exact is not None:
            w, h = map(float, self.exact)
        elif self.longest is not None and max(w, h) > self.longest:
            w, h = w * self.longest / max(w, h), h * self.longest / max(w, h)
        scale = 1.0
        if self.max_pixels is not None and w * h > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (w * h))
        elif self.min_pixels is not None and w * h < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (w * h))
        if scale == 1.0 and (round(w), round(h)) == (width, height):
            return width, height  # nothing that was asked for changes this image: not even the grid
        return self._on_grid(w * scale, h * scale)

    def _on_grid(self, width: float, height: float) -> tuple[int, int]:
        def multiple(side: float) -> int:
            return max(self.grid, round(side / self.grid) * self.grid)

        w, h = multiple(width), multiple(height)
        if self.max_pixels is not None:  # rounding up must not pass the bound
            while w * h > self.max_pixels and max(w, h) > self.grid:
                w, h = (w - self.grid, h) if w >= h else (w, h - self.grid)
        if self.min_pixels is not None:
            while w * h < self.min_pixels:
                w, h = (w + self.grid, h) if w <= h else (w, h + self.grid)
        return w, h

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the image at its size, resampled once (bicubic), or the same image when its size is right already."""
        size = self.size_for(*image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def resize_policy(
    resize: Resize | None, min_pixels: int | None, max_pixels: int | None, *, grid: int, image_size: int | None
) -> ResizePolicy:
    """Return the policy that the arguments ask for.

    Args:
        resize: None or "max" leaves the size; an int bounds the longer side; (width, height) is exact; "min" bounds the
            longer side by the model's own image size.
        min_pixels, max_pixels: bounds on width × height, in pixels.
        grid: the family's patch grid, in pixels.
        image_size: the side of the images that the vision tower was built for, in pixels, where it has one.

    Raises:
        ConfigError: a value is of another kind, not positive, contradicts another, or "min" has nothing to go by.
    """
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name}={value!r} is not a positive number of pixels.")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise ConfigError(f"min_pixels={min_pixels} is above max_pixels={max_pixels}; swap them.")
    longest: int | None = None
    exact: tuple[int, int] | None = None
    if isinstance(resize, str) and resize == "min":
        if image_size is None:
            raise ConfigError(
                "resize='min' needs a model with a fixed image size, and this one has none; pass a number."
            )
        longest = image_size
    elif _positive(resize):
        longest = resize  # type: ignore[assignment]
    elif isinstance(resize, tuple | list) and len(resize) == 2 and all(map(_positive, resize)):
        exact = (int(resize[0]), int(resize[1]))
    elif resize is not None and resize != "max":
        raise ConfigError(f"resize={resize!r} is none of a positive int, (width, height), 'min' and 'max'.")
    return ResizePolicy(longest, exact, min_pixels, max_pixels, grid)


def patch_grid(image_processor: Any) -> int:
    """Return the multiple of pixels that an image processor cuts images into: its patch size × its merge size."""
    settings: Mapping[str, Any] = image_processor.to_dict()
    patch, merge = settings.get("patch_size"), settings.get("merge_size", settings.get("spatial_merge_size"))
    if isinstance(patch, dict):
        patch = patch.get("height")
    if not isinstance(patch, int):
        return 1
    return patch * (merge if isinstance(merge, int) else 1)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
