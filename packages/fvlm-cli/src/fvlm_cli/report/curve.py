"""A loss curve as inline SVG, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from fvlm_cli.report.drawing import LINES, PALE_LINES, as_svg, drawing

_SMOOTH = 0.9  # each point of the smooth line keeps so much of the one before


def smoothed(values: Sequence[float], keep: float = _SMOOTH) -> list[float]:
    """Return the exponential moving average, corrected for its start as Adam's averages are.

    Point ``t`` (from 1) is ``sum(keep**(t-i) * values[i]) / sum(keep**(t-i))`` over ``i <= t``.
    """
    result, average, weight = [], 0.0, 0.0
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def loss_curve(losses: Sequence[float], *, width: float = 7.2, height: float = 2.8) -> str:
    """Draw the loss of each step, and its moving average, against the step.

    Args:
        losses: one value a step, in nats a token, first step first.
        width: of the drawing, in inches of 72 points.
        height: likewise.

    Returns:
        An ``<svg>`` element, without XML declaration, that names no other file. The same losses give the same text.
    """
    from matplotlib.figure import Figure

    steps = range(1, len(losses) + 1)
    with drawing():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=PALE_LINES[0], linewidth=0.8, label="each step", gid="loss-each-step")
        axes.plot(steps, smoothed(losses), color=LINES[0], linewidth=1.8, label="moving average")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        axes.set_ylim(bottom=0)
        axes.set_xlim(1, max(2, len(losses)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return as_svg(figure)
