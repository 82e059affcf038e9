"""matplotlib figures as inline SVG whose colours are the page's, so that they follow its light or dark scheme."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
LINES = ("#010204", "#010205")
PALE_LINES = ("#010206", "#010207")
"""Colours that stand for those of the page's style sheet; nothing else has them."""

_STYLES = {
    INK: "var(--ink-2)",
    LINES[0]: "var(--line-1)",
    LINES[1]: "var(--line-2)",
    PALE_LINES[0]: "var(--pale-1)",
    PALE_LINES[1]: "var(--pale-2)",
}


@contextmanager
def drawing() -> Iterator[None]:
    """A context to draw in: text stays text, and what has no colour of its own gets the page's."""
    import matplotlib as mpl

    inked: tuple[Any, ...] = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        "svg.hashsalt": "fvlm",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9.5,
    }
    with mpl.rc_context({**settings, **dict.fromkeys(inked, INK)}):
        yield


def as_svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element, without XML declaration, that names no other file."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    found = text.getvalue()
    for colour, style in _STYLES.items():
        found = found.replace(colour, style)
    return found[found.index("<svg") :]
