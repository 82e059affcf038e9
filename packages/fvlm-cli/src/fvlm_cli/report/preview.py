"""The page that `fvlm preview --html` writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fvlm_cli.preview.histogram import histogram, quantile
from fvlm_cli.report.page import write_page
from fvlm_cli.report.picture import data_uri

if TYPE_CHECKING:
    from fvlm_cli.preview.look import Preview


def write_preview_page(path: Path, preview: Preview, config: str, model: str) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        preview: what it shows.
        config: the config's path, for its title.
        model: the model's name.
    """
    lengths = preview.lengths
    bins = histogram(lengths)
    write_page(
        path,
        "preview.html.jinja",
        preview=preview,
        config=config,
        model=model,
        bins=bins,
        most=max((item.rows for item in bins), default=1),
        median=quantile(lengths, 0.5) if lengths else 0,
        high=quantile(lengths, 0.95) if lengths else 0,
        pictures=[[data_uri(image.picture) for image in shown.images] for shown in preview.shown],
    )
