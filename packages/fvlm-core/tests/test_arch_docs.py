"""docs/families.md says what the facts say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fvlm_core.arch import TABLE

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the docs are not part of the package's source archive")


def rows(section):
    """Lists of cells, each as the set of its code words, of the one table in a section."""
    body = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("|")][2:]
    return [[set(re.findall(r"`([^`]+)`", cell)) for cell in line.strip("|").split("|")] for line in lines]


def row_of(section, column, model_type):
    found = [row for row in rows(section) if model_type in row[column]]
    assert len(found) == 1, f"{model_type} needs one row in {section!r}"
    return found[0]


@pytest.mark.parametrize("model_type", TABLE)
def test_tables_agree_with_the_facts(model_type):
    facts = TABLE[model_type]
    towers = row_of("Towers", 1, model_type)
    assert towers[2:] == [set(facts.vision), set(facts.projector), set(facts.language)]
    assert row_of("What stays in 16 bit", 0, model_type)[1] == set(facts.unquantized)
    media = row_of("Media tokens", 0, model_type)[1:]
    framing = set(facts.media.framing) | set(facts.media.processor)
    assert media == [set(facts.media.image), set(facts.media.video), framing]
