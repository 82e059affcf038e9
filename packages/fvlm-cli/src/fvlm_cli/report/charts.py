"""Line charts as inline SVG, drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

_COLOURS = ("#1f4e79", "#c05a12")
_PALE = ("#9db8d2", "#e8b48e")


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


def chart(lines: Sequence[Line], label: str, *, width: float = 5.2, height: float = 2.5) -> str:
    """Draw lines against the step.

    Args:
        lines: at least one point in all.
        label: of the vertical axis.
        width, height: in inches of 72 points.

    Returns:
        An ``<svg>`` element that names no other file. The same lines give the same text.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "fvlm", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            colours = _PALE if line.faint else _COLOURS
            marker = "o" if line.dots or len(line.steps) == 1 else None
            width_of_line = 0.8 if line.faint else 1.6
            axes.plot(
                line.steps,
                line.values,
                color=colours[line.run],
                linewidth=width_of_line,
                marker=marker,
                markersize=3.5,
                linestyle="--" if line.dots else "-",
                label=line.name,
                gid=f"line-{number}",
            )
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    # Several charts in one page must not share names.
    prefix = re.sub(r"\W+", "-", label).strip("-")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", drawing[drawing.index("<svg") :])
