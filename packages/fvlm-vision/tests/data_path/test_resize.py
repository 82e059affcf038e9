from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.errors import ConfigError
from fvlm_vision.resize import ResizePolicy, resize_policy


class Processor:
    """What `resize_policy` reads of a processor."""

    def __init__(self, grid: int, bounds: tuple[int, int] | int | None) -> None:
        names = {"min_pixels": int, "max_pixels": int} if isinstance(bounds, tuple) else {}
        edges = dict(zip(("shortest_edge", "longest_edge"), bounds, strict=True)) if names else {"longest_edge": bounds}
        self.image_processor = SimpleNamespace(
            to_dict=lambda: {"patch_size": grid},
            valid_kwargs=SimpleNamespace(__annotations__=names),
            size=edges,
        )


def policy(resize=None, min_pixels=None, max_pixels=None, grid=1, image_size=None, own=None):
    return resize_policy(resize, min_pixels, max_pixels, processor=Processor(grid, own), image_size=image_size)


@pytest.mark.parametrize("resize", [None, "max"])
def test_nothing_asked_leaves_the_very_image(resize):
    image = Image.new("RGB", (123, 45))
    assert policy(resize, grid=28).apply(image) is image


def test_sizes():
    assert policy(100).size_for(400, 200) == (100, 50)
    assert policy(100).size_for(80, 20) == (80, 20)  # never enlarged
    assert policy((30, 70)).size_for(400, 200) == (30, 70)
    assert policy("min", image_size=64).size_for(128, 64) == (64, 32)
    assert policy(100, grid=28).size_for(400, 200) == (112, 56)
    assert policy(max_pixels=10_000).size_for(200, 200) == (100, 100)
    assert policy(min_pixels=10_000).size_for(50, 50) == (100, 100)
    assert policy(max_pixels=13_000, grid=28).size_for(90, 90) == (90, 90)  # within the bound: not even snapped
    assert policy(max_pixels=10_000, grid=28).size_for(98, 98) == (84, 112)  # the processor would make it 112 × 112
    assert policy(100, grid=14, own=64).size_for(300, 150) == (56, 28)  # its shape is kept
    assert policy(40, grid=28, own=(3136, 12544)).size_for(400, 100) == (112, 28)  # 40 × 10 would be enlarged again


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([1, 14, 28, 32]),
    st.integers(1, 40),
    st.integers(160, 4000),
)
def test_bounds_hold_on_the_grid(width, height, grid, low, high):
    low, high = low * grid * grid, high * grid * grid
    bounded = ResizePolicy(min_pixels=low, max_pixels=high, grid=grid)
    w, h = bounded.size_for(width, height)
    if (w, h) != (width, height):
        assert w % grid == h % grid == 0
    if max(width, height) <= 4 * min(width, height):  # a sliver one cell wide may not fit between the bounds
        assert low <= w * h
    assert w * h <= max(high, max(w, h) * grid)  # more only where one cell wide is too many already


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"resize": "min"}, "resize='min'"),
        ({"resize": 0}, "resize=0"),
        ({"resize": "big"}, "resize='big'"),
        ({"resize": (1, 2, 3)}, "resize="),
        ({"resize": True}, "resize=True"),
        ({"min_pixels": 5, "max_pixels": 4}, "min_pixels=5"),
        ({"max_pixels": -1}, "max_pixels=-1"),
        ({"max_pixels": 100, "own": (3136, 12544)}, "max_pixels=100 cannot be had"),
        ({"min_pixels": 20_000, "own": (3136, 12544)}, "min_pixels=20000 cannot"),
        ({"resize": (200, 200), "own": (3136, 12544)}, "3136 to 12544 pixels"),
        ({"resize": (20, 80), "grid": 14, "own": 64}, "no side over 64"),
    ],
)
def test_bad_values_are_refused(arguments, part):
    with pytest.raises(ConfigError) as caught:
        policy(**arguments)
    assert part in str(caught.value)


QWEN = [{"resize": 50}, {"resize": (64, 84)}, {"max_pixels": 4500}, {"min_pixels": 7500, "max_pixels": 12000}]
PIXTRAL = [{"resize": 50}, {"resize": (33, 60)}, {"max_pixels": 2500}, {"min_pixels": 3900}]
ASKED = {"qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "pixtral": PIXTRAL, "mistral3": PIXTRAL}


@pytest.mark.parametrize(("family", "asked"), [(family, asked) for family in ASKED for asked in ASKED[family]])
def test_the_familys_processor_does_not_resample_again(family, asked, processor_of, picture):
    """Once resized here, the pixels are those that the processor gives without any resizing of its own."""
    processor = processor_of(family)
    arguments = {"resize": None, "min_pixels": None, "max_pixels": None, **asked}
    policy = resize_policy(**arguments, processor=processor, image_size=None)
    resized = 0
    for size in ((80, 60), (61, 40), (45, 83), (300, 100), (90, 10)):
        image = policy.apply(picture(*size))
        if image.size == size:
            continue
        resized += 1
        options = {"text": processor.image_token, "images": [image], "return_tensors": "pt"}
        as_it_is = processor(**options, do_resize=False)["pixel_values"]
        assert torch.equal(processor(**options)["pixel_values"], as_it_is), (size, image.size)
    assert resized
