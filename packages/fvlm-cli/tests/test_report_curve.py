from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from fvlm_cli.report.curve import loss_curve, smoothed


def test_smoothing_is_the_weighted_mean_it_says():
    values = [4.0, 1.0, 2.0]
    weights = [[1.0], [0.9, 1.0], [0.81, 0.9, 1.0]]
    expected = [sum(w * v for w, v in zip(row, values, strict=False)) / sum(row) for row in weights]
    assert smoothed(values) == pytest.approx(expected)
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)


def _heights(svg: str) -> list[float]:
    """The y coordinates of the loss of each step, downwards."""
    group = ET.fromstring(svg).find(".//*[@id='loss-each-step']")
    path = group.find("{http://www.w3.org/2000/svg}path").get("d")
    return [float(y) for y in path.replace("M", "").replace("L", "").split()[1::2]]


def test_the_line_goes_where_the_losses_go():
    svg = loss_curve([2.0, 1.0, 1.5, 0.5])
    assert svg.startswith("<svg")
    first, second, third, fourth = _heights(svg)
    assert first < third < second < fourth  # higher losses are nearer the top
    assert (second - first) == pytest.approx(2 * (second - third), rel=1e-3)


def test_one_step_and_a_repeat_draw():
    assert "<svg" in loss_curve([1.0])
    assert loss_curve([1.0, 2.0]) == loss_curve([1.0, 2.0])
