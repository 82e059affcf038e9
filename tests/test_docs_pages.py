"""The commands and programs of the documentation run, and a block that does not says why."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from docs_tools import CODE, ROOT, blocks, run_page, scans

READMES = [ROOT / "README.md", *ROOT.glob("packages/*/README.md"), *ROOT.glob("examples/*/README.md")]
WRITTEN = [*READMES, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted(WRITTEN)}
ELSEWHERE = {  # pages that a test of their own runs
    "docs/tutorial.md": "tests/test_docs_tutorial.py",
    "packages/fvlm-core/README.md": "packages/fvlm-core/tests/test_core_readme.py",
    "packages/fvlm-vision/README.md": "packages/fvlm-vision/tests/model/test_model_readme.py",
}
RUN = [name for name, path in PAGES.items() if name not in ELSEWHERE and any(block.runs for block in blocks(path))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(PAGES[page]):
        where = f"{page}, line {block.line}"
        assert block.language, f"{where}: name the block's language; it is text if it is no code"
        if block.language in CODE and not block.runs:
            assert block.mark is not None, f"{where}: is it a file, or not run, and why? say so in a comment before it"
        if block.mark == "not run":
            assert len(str(block.value).split()) > 2, f"{where}: {block.value!r} is no reason"


def test_the_tests_of_their_own_are_there() -> None:
    for page, test in ELSEWHERE.items():
        assert PAGES[page].name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", RUN)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_of_the_docs: Path) -> None:
    monkeypatch.chdir(tmp_path)
    scans(tmp_path / "scans")
    shutil.copy("scans/00.png", "page.png")
    printed = run_page(PAGES[page], model_of_the_docs, {"max_steps=100": "max_steps=2"})
    CHECKS.get(page, lambda printed, folder: None)(printed, tmp_path)


def _readme(printed: str, folder: Path) -> None:
    assert (folder / "adapter/adapter_config.json").exists()
    assert json.loads((folder / "merged/fvlm_export.json").read_text())["merged"] > 0


def _what_to_tune(printed: str, folder: Path) -> None:
    assert "trainable params" in printed
    trained = [int(figure.replace(",", "")) for figure in re.findall(r"([\d,]+) trained", printed)]
    both, vision = trained[:2]  # all of it, then tower by tower
    assert trained[5:7] == [both - vision, 0]
    assert json.loads((folder / "second/run.json").read_text())["steps"] == 2


def _data_formats(printed: str, folder: Path) -> None:
    assert printed.count("⟦4821") == 5  # one for each shape but the folder


def _multi_turn(printed: str, folder: Path) -> None:
    learned = [text.split("<|im_end|>")[0] for text in re.findall(r"⟦(.*?)⟧", printed, flags=re.DOTALL)]
    assert learned == ["4821", "17", "305"]
    assert json.loads(printed.splitlines()[-1])["answer"]


def _evaluation(printed: str, folder: Path) -> None:
    base, tuned = (json.loads((folder / name / "metrics.json").read_text()) for name in ("eval-base", "eval-first"))
    assert base["loss"] > tuned["loss"]
    assert (folder / "first/report.html").exists()
    assert re.search(r"\d+% of the answers", printed)


def _serving(printed: str, folder: Path) -> None:
    from_fvlm, from_transformers, verified = printed.splitlines()[-3:]
    assert from_transformers == str([from_fvlm])
    assert ast.literal_eval(verified)["weights"]["untouched_equal"] > 0


CHECKS = {
    "README.md": _readme,
    "docs/guides/what-to-tune.md": _what_to_tune,
    "docs/guides/data-formats.md": _data_formats,
    "docs/guides/multi-turn.md": _multi_turn,
    "docs/guides/evaluation.md": _evaluation,
    "docs/guides/serving.md": _serving,
}
