"""Keys that reach the trainer's inside: learning rates by tower, packing; and what a run's record says of git."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fvlm_cli.config.read import read_config
from fvlm_cli.output import Output
from fvlm_cli.training.run import run
from fvlm_core.errors import ConfigError
from fvlm_vision import FastVisionTrainer


def trained(folder: Path, name: str, *words: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Train; return the record and how far each tower's B matrices, which start at zero, have come."""
    config = read_config(folder / "config.yaml", ["eval.rows=null", f"save.output_dir={name}", *words])
    record = run(config, Output(quiet=True), resume=False)
    moved = {"vision": 0.0, "language": 0.0, "projector": 0.0}
    for key, tensor in load_file(folder / name / "adapter/adapter_model.safetensors").items():
        if "lora_B" in key:
            tower = "projector" if ".merger." in key else "vision" if ".visual." in key else "language"
            moved[tower] = max(moved[tower], float(tensor.abs().max()))
    return record, moved


@pytest.mark.parametrize("flat", [False, True], ids=["single", "flat"])
def test_a_tower_learns_at_its_own_rate(handwriting_run: Path, monkeypatch: pytest.MonkeyPatch, flat: bool) -> None:
    monkeypatch.setattr(FastVisionTrainer, "_can_be_flat", lambda *_: flat)
    monkeypatch.chdir(handwriting_run)
    _, both = trained(handwriting_run, f"both-{flat}", "train.max_steps=1")
    assert both["vision"] == pytest.approx(2e-3, rel=0.02)  # Adam's first step is as long as the rate
    assert both["language"] == pytest.approx(2e-3, rel=0.02)
    rates = ("train.vision_learning_rate=1e-5", "train.projector_learning_rate=4e-4")
    _, own = trained(handwriting_run, f"own-{flat}", "train.max_steps=1", "lora.finetune_projector_layers=true", *rates)
    assert own["vision"] == pytest.approx(1e-5, rel=0.02)
    assert own["projector"] == pytest.approx(4e-4, rel=0.02)
    assert own["language"] == pytest.approx(both["language"], rel=1e-4)
    history = json.loads((handwriting_run / f"own-{flat}/history.json").read_text())
    assert history[0]["learning_rate"] == 2e-3


def test_a_rate_for_what_is_not_trained_is_refused(handwriting_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(handwriting_run)
    with pytest.raises(ConfigError, match=r"train\.projector_learning_rate is given, and nothing of the projector"):
        trained(handwriting_run, "refused", "train.projector_learning_rate=1e-3")


def test_packing_reaches_the_collator_and_changes_no_loss(
    handwriting_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(handwriting_run)
    from fvlm_vision import FastVisionDataCollator

    seen: list[Any] = []
    original = FastVisionDataCollator.__call__

    def watched(self: Any, samples: Any) -> Any:
        batch = original(self, samples)
        seen.append(batch["input_ids"].shape[0])
        return batch

    monkeypatch.setattr(FastVisionDataCollator, "__call__", watched)
    losses = []
    for name, words in (("padded", ()), ("packed", ("data.packing=true",))):
        trained(handwriting_run, name, "train.max_steps=3", *words)
        history = json.loads((handwriting_run / name / "history.json").read_text())
        losses.append([entry["loss"] for entry in history if "loss" in entry])
        assert seen[0] == (6 if name == "padded" else 1)
        seen.clear()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_record_names_the_commit(handwriting_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fvlm_cli.versions import git_state

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    assert "git" in json.loads((handwriting_run / "run/run.json").read_text())

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    assert git_state() is None
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "one")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "a").write_text("2")
    assert git_state() == {"commit": git("rev-parse", "HEAD"), "changed": True}
