"""The notebooks in `examples/notebooks` run from top to bottom, and do what their text says."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples/notebooks").glob("*.ipynb"))


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: nbformat.NotebookNode) -> str:
    streams = [output for output in outputs(notebook) if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    ran = [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count") is not None]
    assert ran == [], f"clear the outputs of {path.name} before it is committed"


def test_the_digits_are_learned_saved_merged_and_read_again(tmp_path: Path) -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem == "digits")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = printed(notebook)
    right = {when: int(count) for when, count in re.findall(r"(before|after|merged): (\d+) of 64 right", text)}
    assert right["after"] > right["before"] + 16
    assert right["merged"] > right["before"] + 16
    assert int(re.search(r"(\d+) of 64 as before the merge", text)[1]) >= 62  # type: ignore[index]
    assert re.search(r"[5-7] of \d+ tokens are learned: '\d{3,5}<\|im_end\|>\\n'", text)
    assert (tmp_path / "adapter/adapter_config.json").exists()
    shown = [output.data for output in outputs(notebook) if output.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in data for data in shown) == 3  # a lesson, the curve, a test
