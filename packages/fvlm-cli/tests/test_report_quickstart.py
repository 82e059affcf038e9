from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fvlm_cli.report import write_quickstart_report

SUMMARY = {
    "accuracy_before": 0.25,
    "accuracy_after": 0.75,
    "merged_agreement": 1.0,
    "train_seconds": 12.3,
    "total_seconds": 45.6,
    "device": "cpu <&>",
    "output_dir": "somewhere",
    "test_images": 4,
    "steps": 3,
    "batch_size": 2,
    "seed": 7,
    "parameters": 1234567,
    "trainable_parameters": 8901,
}


@dataclass
class Read:
    truth: list[str]
    before: list[str]
    after: list[str]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.sources.append(values["src"])
        self.links += [v for k, v in attrs if k in ("href", "xlink:href") and v]

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture
def page(tmp_path):
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 128), dtype=np.uint8)) for i in range(4)]
    read = Read(["123", "456", "789", "000"], ["123", "", "777", "1"], ["123", "456", "789", "<script>x</script>"])
    write_quickstart_report(tmp_path / "report.html", SUMMARY, [2.0, 1.0, 0.5], images, read)
    found = Page()
    found.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    found.images = images
    return found


def test_the_page_needs_nothing_else(page):
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "svg" in page.tags


def test_the_images_are_the_test_images(page):
    # four in the grid, and once more the one that is misread
    shown = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in page.sources]
    assert len(shown) == 5
    for image, original in zip(shown, [*page.images, page.images[3]], strict=True):
        assert np.array_equal(image, original)


def test_figures_and_readings_are_there(page):
    text = " ".join(page.text.split())
    for figure in ("25.0%", "75.0%", "100.0%", "12 s", "46 s in all", "8,901 of 1,234,567", "cpu <&>", "Seed 7"):
        assert figure in text
    assert "still misread (1 of 4)" in text
    assert "truth 456 before (nothing) ✗ after 456 ✓" in text
    assert "truth 000 before 1 ✗ after <script>x</script> ✗" in text
