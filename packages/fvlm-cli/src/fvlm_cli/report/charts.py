"""Line charts as inline SVG, drawn by matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fvlm_cli.report.drawing import LINES, PALE_LINES, as_svg, drawing


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend.
        steps, values: its points.
        run: 0 or 1: which run it belongs to, by colour.
        faint: whether it is in the background.
        dots: whether points are marked.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    run: int = 0
    faint: bool = False
    dots: bool = False


def chart(lines: Sequence[Line], label: str, *, width: float = 4.2, height: float = 2.3) -> str:
    """Draw lines against the step.

    Args:
        lines: at least one point in all.
        label: what is drawn, above it.
        width, height: in inches of 72 points; a legend makes it higher.

    Returns:
        An ``<svg>`` element that names no other file. The same lines give the same text.
    """
    from matplotlib.figure import Figure

    rows = -(-len(lines) // 3) if len(lines) > 1 else 0
    with drawing():
        figure = Figure(figsize=(width, height + 0.2 * rows), layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            colours = PALE_LINES if line.faint else LINES
            axes.plot(
                line.steps,
                line.values,
                color=colours[line.run],
                linewidth=0.8 if line.faint else 1.6,
                marker="o" if line.dots or len(line.steps) == 1 else None,
                markersize=3.5,
                linestyle="--" if line.dots else (0, (4, 2)) if line.run else "-",  # seen where one covers the other
                label=line.name,
                gid=f"line-{number}",
            )
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.15)
        if rows:
            figure.legend(loc="outside lower left", frameon=False, fontsize=8, ncols=3)
        svg = as_svg(figure)
    # Several charts in one page must not share names.
    prefix = re.sub(r"\W+", "-", label).strip("-")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
