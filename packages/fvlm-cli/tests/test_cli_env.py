"""`fvlm env --model`: which accelerations apply to a model on a machine, and why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fvlm_cli.inspection import accelerations as module
from fvlm_cli.inspection.accelerations import Acceleration, accelerations
from fvlm_cli.inspection.opened import open_model
from fvlm_core.testing import tiny_checkpoint

HOPPER, TURING = {"capability": "9.0"}, {"capability": "7.5"}
ON_GPU = (
    "fused layers",
    "CUDA graphs of checkpointed blocks",
    '"auto" checkpointing',
    "CUDA graphs of decoding steps",
    "4-bit kernels",
    "flat optimizer",
)


def found(folder: Path, *devices: dict[str, Any]) -> dict[str, Acceleration]:
    return {item.name: item for item in accelerations(open_model(str(folder)), devices)}


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is there, whatever torch was installed with."""
    monkeypatch.setattr(module, "find_spec", lambda name: name)


@pytest.mark.usefixtures("triton")
def test_a_family_with_tables_gets_everything_on_a_gpu(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2_vl", tmp_path / "base")
    here = found(folder, HOPPER)
    assert [name for name, item in here.items() if not item.applies] == []
    assert "2 vision block" in here["fused layers"].why
    assert "2 decoder layer" in here["fused layers"].why
    old = found(folder, HOPPER, TURING)
    assert not old["bfloat16"].applies
    assert "7.5" in old["bfloat16"].why
    nowhere = found(folder)
    assert {name for name, item in nowhere.items() if not item.applies} == set(ON_GPU)
    assert all("no CUDA device here" in nowhere[name].why for name in ON_GPU)


def test_without_triton_nothing_is_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    here = found(tiny_checkpoint("qwen2_vl", tmp_path / "base"), HOPPER)
    assert {name for name, item in here.items() if not item.applies} == set(ON_GPU)
    assert "triton is not installed" in here["fused layers"].why


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("family", "name", "part"),
    [
        ("smolvlm", "fused layers", "no table of fused layers is written for smolvlm"),
        ("smolvlm", "CUDA graphs of decoding steps", "the family has no table of fused layers"),
        ("mllama", "packing", "other samples' images"),
        ("mllama", "pixels as bytes until the device", "MllamaImageProcessor"),
        ("gemma3", "vision attention without a loop", "packs images"),
    ],
)
def test_why_not(tmp_path: Path, family: str, name: str, part: str) -> None:
    item = found(tiny_checkpoint(family, tmp_path / "base"), HOPPER)[name]
    assert not item.applies
    assert part in item.why


def test_what_it_says_of_fused_layers_is_what_loading_does(tmp_path: Path) -> None:
    from collections import Counter

    from fvlm_core import load_model
    from fvlm_core.fused import fusion_report

    folder = tiny_checkpoint("qwen3_vl", tmp_path / "base")
    model = load_model(str(folder), fused_layers=True)
    kinds = Counter(fusion_report(model).fused.values())
    said = found(folder)["fused layers"].why
    assert kinds
    assert all(f"{count} {kind.replace('_', ' ')}" in said for kind, count in kinds.items())
