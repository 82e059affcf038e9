"""The page that ``fvlm quickstart`` leaves: figures, loss curve, and what was read on the test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fvlm_cli.report.curve import loss_curve
from fvlm_cli.report.page import write_page
from fvlm_cli.report.picture import data_uri

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 48
"""How many test images the grid shows: the first ones, whatever was read on them."""


class Read(Protocol):
    """What was read on each test image, in the order of the images."""

    @property
    def truth(self) -> Sequence[str]:
        """What is written there."""

    @property
    def before(self) -> Sequence[str]:
        """Read before training."""

    @property
    def after(self) -> Sequence[str]:
        """Read after training."""


@dataclass(frozen=True)
class _Card:
    image: str
    truth: str
    before: str
    after: str


def write_quickstart_report(
    path: Path, summary: Mapping[str, Any], losses: Sequence[float], images: Sequence[Image.Image], read: Read
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        summary: what ``summary.json`` holds.
        losses: one a step.
        images: the test images.
        read: what was read on them.
    """
    from markupsafe import Markup

    rows = zip(images, read.truth, read.before, read.after, strict=True)
    cards = [_Card(data_uri(image), truth, before, after) for image, truth, before, after in rows]
    write_page(
        path,
        "quickstart.html.jinja",
        summary=summary,
        curve=Markup(loss_curve(losses)),
        cards=cards[:SHOWN],
        missed=[card for card in cards if card.after != card.truth],
    )
