"""The pages of the kernels show the committed rows, and say of each op what a page must say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import fvlm_kernels

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "kernels"


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.kernels.pages")


def test_the_pages_show_the_committed_rows(pages, capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_page_is_named_and_written(pages, tmp_path, capsys):
    for path in FOLDER.glob("*.md"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    norms = tmp_path / "norms.md"
    norms.write_text(norms.read_text(encoding="utf-8").replace("| forward |", "| first |"), encoding="utf-8")
    assert pages.main(["--check", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "norms.md is not what the rows say\n"
    assert pages.main(["--folder", str(tmp_path)]) == 0
    assert norms.read_text(encoding="utf-8") == (FOLDER / "norms.md").read_text(encoding="utf-8")


def test_every_page_says_what_a_page_must(pages):
    for name in pages.PAGES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        headings = set(re.findall(r"^## (\w+)", text, re.MULTILINE))
        assert {"Maths", "Shapes", "Numerics", "When", "Rows"} <= headings, name
        assert "same bits" in text, name  # how deterministic it is


def test_every_op_has_a_page(pages):
    text = "".join((FOLDER / name).read_text(encoding="utf-8") for name in pages.PAGES)
    ops = [n for n in fvlm_kernels.__all__ if n.islower() and n[0] != "_"]
    assert ops
    assert [n for n in ops if f"`{n}" not in text] == []
