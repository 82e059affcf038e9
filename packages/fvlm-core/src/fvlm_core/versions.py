"""Where the installed transformers behaves otherwise than an older one, and nothing but its version tells.

What can be read off a class or a function is read there. Every comparison of versions stands here.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version


def transformers_at_least(major: int, minor: int) -> bool:
    """Tell whether the installed transformers is of this release or a newer one; its pre-releases count as it."""
    return _installed() >= (major, minor)


def counts_parts_of_seconds() -> bool:
    """Whether Qwen2.5-VL takes the time between a video's frames as it is; before 5.18 it took whole seconds only."""
    return transformers_at_least(5, 18)


def mixes_up_packed_images() -> bool:
    """Whether the sliding mask of a packed row looks up Gemma 3's images by their place in a sample, not in the row.

    Since 5.23 `create_causal_mask` wraps the overlay of image tokens in its map from places to positions.
    """
    return transformers_at_least(5, 23)


@cache
def _installed() -> tuple[int, int]:
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)
