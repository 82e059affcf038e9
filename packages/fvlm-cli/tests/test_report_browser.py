"""The pages in a real browser: no complaint, every image seen, filters that filter, legible in both colour schemes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_tools import CHROMEDRIVER, CHROMIUM, LEAST_CONTRAST, Browser

from fvlm_cli.quickstart.handwriting import writings
from fvlm_cli.report import write_quickstart_report
from fvlm_cli.report.gathered import gather
from fvlm_cli.report.run import write_run_report

MISSING = CHROMIUM is None or CHROMEDRIVER is None
# FVLM_CHROMIUM=1 says that they are here: then nothing is passed over.
pytestmark = pytest.mark.skipif(
    MISSING and os.environ.get("FVLM_CHROMIUM") != "1", reason="no chromium and chromedriver on this machine"
)
LEGIBLE = 4.5  # WCAG 2.1, level AA
IMAGES = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
CARDS = "return [...document.querySelectorAll('.card')].filter(c => c.getClientRects().length).map(c => c.className)"
LINES = "return [...document.querySelectorAll('svg path')].filter(p => p.getBoundingClientRect().width > 20).length"
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def run(handwriting_run: Path) -> Path:
    """A run in which one answer is made worse and one is put right by training."""
    folder = handwriting_run / "browsed"
    shutil.copytree(handwriting_run / "run", folder)
    path = folder / "eval/after.jsonl"
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    answers[0] |= {"prediction": "<script>document.title = 'taken'</script>", "exact_match": 0.0, "cer": 9.0}
    answers[1] |= {"prediction": answers[1]["truth"], "exact_match": 1.0, "cer": 0.0}
    path.write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    return folder


def report(folder: Path, run: Path, fvlm: Any) -> Path:
    write_run_report(folder / "report.html", gather(run), None, 200)
    return folder / "report.html"


def comparison(folder: Path, run: Path, fvlm: Any) -> Path:
    write_run_report(folder / "both.html", gather(run), gather(run.parent / "run"), 200)
    return folder / "both.html"


def preview(folder: Path, run: Path, fvlm: Any) -> Path:
    done = fvlm("preview", "config.yaml", "-n", "4", "--html", str(folder / "preview.html"), "--quiet", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    return folder / "preview.html"


class Read:
    def __init__(self, truth: list[str]) -> None:
        self.truth, self.before, self.after = truth, ["?"] * len(truth), [*truth[:-1], ""]


def quickstart(folder: Path, run: Path, fvlm: Any) -> Path:
    written = list(writings(6, 0, test=True))
    summary = {
        **dict.fromkeys(("accuracy_before", "accuracy_after", "merged_agreement"), 0.5),
        **dict.fromkeys(("train_seconds", "total_seconds", "test_images", "steps", "batch_size", "seed"), 6),
        "device": "cpu",
        "output_dir": "x",
        "parameters": 3_038_592,
        "trainable_parameters": 12_345,
    }
    path = folder / "quickstart.html"
    write_quickstart_report(path, summary, [3.0, 2.0, 1.0], [w.image for w in written], Read([w.text for w in written]))
    return path


@pytest.mark.parametrize("make", [report, comparison, preview, quickstart])
def test_a_page_is_drawn_without_complaint_and_legible(
    browser: Browser, make: Any, run: Path, fvlm: Any, tmp_path: Path
) -> None:
    page = make(tmp_path, run, fvlm)
    for scheme in ("light", "dark"):
        browser.emulate(scheme, 1200)
        browser.open(page)
        contrast, text = browser.run(LEAST_CONTRAST)
        assert contrast >= LEGIBLE, (scheme, text)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 23, 29)"
    images = browser.run(IMAGES)
    assert images
    assert all(complete and natural > 0 and drawn > 40 for complete, natural, drawn in images), images
    if make is not preview:
        assert browser.run(LINES) >= (2 if make is quickstart else 6)
    browser.emulate("light", 400)
    assert browser.run(OVERFLOW) <= 0
    assert browser.complaints() == []


def test_filters_leave_what_they_name(browser: Browser, run: Path, tmp_path: Path) -> None:
    browser.emulate("light", 1200)
    browser.open(report(tmp_path, run, None))
    everything = browser.run(CARDS)
    assert len(everything) == 5
    for name in ("wrong", "fixed", "worse"):
        browser.click(f"label[for=f-{name}]")
        expected = [kinds for kinds in everything if f"is-{name}" in kinds.split()]
        assert browser.run(CARDS) == expected
        assert expected, name
        said = browser.run(f"return document.querySelector('label[for=f-{name}]').textContent")
        assert said.endswith(f"({len(expected)})")
    browser.click("label[for=f-all]")
    assert browser.run(CARDS) == everything
    browser.click("summary")
    assert browser.run("return document.querySelector('pre').getBoundingClientRect().height") > 100
    assert browser.run("return document.title").startswith("fvlm report")  # nothing of the data ran
    assert browser.complaints() == []


def test_the_browser_tells_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<p style='color: #999'>pale</p><img src='data:image/png;base64,AAAA'><script>console.error('no')</script>",
        encoding="utf-8",
    )
    browser.open(page)
    assert browser.run(LEAST_CONTRAST)[0] < LEGIBLE
    assert browser.run(IMAGES)[0][1] == 0
    assert any("no" in line for line in browser.complaints())
