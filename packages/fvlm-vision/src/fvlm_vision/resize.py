"""Changing an image's resolution, only when asked, by one resampling.

The size is worked out first (`resize`, then `min_pixels`/`max_pixels`, then the family's patch grid) and the image is
resampled once to it. Snapping to the grid, and to the bounds that a family's processor has of its own, keeps that
processor (of the Qwen families, of Pixtral) from resampling a second time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from fvlm_core.errors import ConfigError
from fvlm_vision.arguments import is_positive

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
        own: the processor's own bounds on width × height, which a changed size keeps to; None where it has none.
        own_longest: the processor's own bound on the longer side, the same way.
    """

    longest: int | None = None
    exact: tuple[int, int] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    grid: int = 1
    own: tuple[int, int] | None = None
    own_longest: int | None = None

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
        if (round(w), round(h)) == (width, height) and self._stays_within(width, height):
            return width, height  # nothing that was asked for changes this image: not even the grid
        low, high = self.own or (0, None)
        low, high = max(low, self.min_pixels or 0), min((n for n in (high, self.max_pixels) if n), default=None)
        scale = 1.0
        if high is not None and w * h > high:
            scale = math.sqrt(high / (w * h))
        elif w * h < low:
            scale = math.sqrt(low / (w * h))
        if self.own_longest is not None:
            scale = min(scale, self.own_longest / max(w, h))
        return self._on_grid(w * scale, h * scale, low, high)

    def _stays_within(self, width: int, height: int) -> bool:
        """Return whether the asked bounds hold, also after the processor has rounded the sides to its grid."""
        least = math.prod(side // self.grid * self.grid for side in (width, height))
        most = math.prod(-(-side // self.grid) * self.grid for side in (width, height))
        return (self.max_pixels is None or most <= self.max_pixels) and (
            self.min_pixels is None or least >= self.min_pixels
        )

    def _on_grid(self, width: float, height: float, low: int, high: int | None) -> tuple[int, int]:
        longest = math.inf if self.own_longest is None else self.own_longest // self.grid * self.grid

        def multiple(side: float) -> int:
            return int(min(longest, max(self.grid, round(side / self.grid) * self.grid)))

        w, h = multiple(width), multiple(height)
        if high is not None:  # rounding up must not pass the bound
            while w * h > high and max(w, h) > self.grid:
                w, h = (w - self.grid, h) if w >= h else (w, h - self.grid)
        while w * h < low:  # rounding down must not either, unless a sliver cannot meet both: the upper bound wins
            grown = sorted(((w + self.grid, h), (w, h + self.grid)), key=max)  # the shorter side first
            fitting = [size for size in grown if max(size) <= longest and (high is None or math.prod(size) <= high)]
            if not fitting:
                break
            w, h = fitting[0]
        return w, h

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the image at its size, resampled once (bicubic), or the same image when its size is right already."""
        size = self.size_for(*image.size)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def resize_policy(
    resize: Resize | None, min_pixels: int | None, max_pixels: int | None, *, processor: Any, image_size: int | None
) -> ResizePolicy:
    """Return the policy that the arguments ask for.

    Args:
        resize: None or "max" leaves the size; an int bounds the longer side; (width, height) is exact; "min" bounds the
            longer side by the model's own image size.
        min_pixels, max_pixels: bounds on width × height, in pixels.
        processor: of the family; its patch grid and its own bounds are kept to.
        image_size: the side of the images that the vision tower was built for, in pixels, where it has one.

    Raises:
        ConfigError: a value is of another kind, not positive, contradicts another or the processor's own bounds, or
            "min" has nothing to go by.
    """
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None and not is_positive(value):
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
    elif is_positive(resize):
        longest = resize
    elif isinstance(resize, tuple | list) and len(resize) == 2 and all(map(is_positive, resize)):
        exact = (int(resize[0]), int(resize[1]))
    elif resize is not None and resize != "max":
        raise ConfigError(f"resize={resize!r} is none of a positive int, (width, height), 'min' and 'max'.")
    policy = ResizePolicy(longest, exact, min_pixels, max_pixels, patch_grid(processor), *own_bounds(processor))
    _check_against_own(policy)
    return policy


def _check_against_own(policy: ResizePolicy) -> None:
    """Raise where the processor would bring every image back to sizes that are not the ones asked for."""
    low, high = policy.own or (0, None)
    if policy.own_longest is not None:
        high = policy.own_longest**2
    if high is None:
        return
    area = math.prod(policy.exact or ())
    for name, value, out in (
        ("resize", policy.exact, policy.exact is not None and not low <= area <= high),
        ("resize", policy.exact, max(policy.exact or (0,)) > (policy.own_longest or math.inf)),
        ("min_pixels", policy.min_pixels, (policy.min_pixels or 0) > high),
        ("max_pixels", policy.max_pixels, (policy.max_pixels or low) < low),
    ):
        if out:
            edge = "" if policy.own_longest is None else f", no side over {policy.own_longest}"
            raise ConfigError(
                f"{name}={value} cannot be had: this processor brings every image to {low} to {high} pixels{edge}; ask "
                "for a size within that, or change processor.image_processor.size."
            )


def patch_grid(processor: Any) -> int:
    """Return the multiple of pixels that a processor cuts images into: its patch size × its merge size."""
    settings: Mapping[str, Any] = processor.image_processor.to_dict()
    patch, merge = settings.get("patch_size"), settings.get("merge_size")
    if merge is None:  # Mistral 3 keeps it on the processor
        merge = vars(processor).get("spatial_merge_size")
    if isinstance(patch, dict):
        patch = patch.get("height")
    if not isinstance(patch, int):
        return 1
    return patch * (merge if isinstance(merge, int) else 1)


def own_bounds(processor: Any) -> tuple[tuple[int, int] | None, int | None]:
    """Return what a processor that keeps an image's shape brings it to by itself.

    Returns:
        Bounds on width × height, for image processors that take `min_pixels` and `max_pixels` and keep them as the
        edges of `size` (the Qwen families); and the bound on the longer side, for those that cut patches of an image
        of any shape (Pixtral). None each where there is none.
    """
    images = processor.image_processor
    size: Mapping[str, Any] = dict(images.size)
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    if {"min_pixels", "max_pixels"} <= set(images.valid_kwargs.__annotations__):
        return ((low, high) if isinstance(low, int) and isinstance(high, int) else None), None
    return None, high if isinstance(high, int) and low is None and patch_grid(processor) > 1 else None
