from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvlm_core.errors import ConfigError
from fvlm_vision.resize import ResizePolicy, resize_policy


def policy(resize=None, min_pixels=None, max_pixels=None, grid=1, image_size=None):
    return resize_policy(resize, min_pixels, max_pixels, grid=grid, image_size=image_size)


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
    assert policy(max_pixels=10_000, grid=28).size_for(90, 90) == (90, 90)  # within the bound: not even snapped


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
    assert w * h <= max(high, max(w, h) * grid)


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
    ],
)
def test_bad_values_are_refused(arguments, part):
    with pytest.raises(ConfigError) as caught:
        policy(**arguments)
    assert part in str(caught.value)
