"""The whole command, with few steps: every figure in its summary is worked out again from what it left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings
from fvlm_cli.quickstart.progress import LineWatcher
from fvlm_cli.quickstart.reading import exact_match, transcribe
from fvlm_cli.quickstart.run import Settings, run
from fvlm_core.errors import CheckpointError, ConfigError
from fvlm_export import save_pretrained_merged

STEPS, IMAGES = 25, 48
PROMISED = {
    "accuracy_before",
    "accuracy_after",
    "merged_agreement",
    "train_seconds",
    "total_seconds",
    "device",
    "output_dir",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through the library, with fewer test images than the command has."""
    lines: list[str] = []
    settings = Settings(tmp_path_factory.mktemp("run") / "out", steps=STEPS, seed=3, test_images=IMAGES)
    return run(settings, LineWatcher(lines.append)), settings.output, lines


def test_summary_and_report(finished):
    summary, folder, lines = finished
    written = json.loads((folder / "summary.json").read_text())
    assert set(written) >= PROMISED
    assert written["output_dir"] == str(folder)
    assert written["accuracy_after"] == summary.accuracy_after
    assert written["parameters"] == 3_038_592
    assert 0 < written["train_seconds"] < written["total_seconds"]
    assert written["device"] == ("cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert "Train …" in lines
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure") >= IMAGES
    assert f"trained for {STEPS} steps" in " ".join(page.split())


@pytest.mark.parametrize(("environment", "inside"), [(None, 1), ("2", 2)])
def test_one_thread_on_a_cpu_unless_the_environment_says_otherwise(monkeypatch, environment, inside):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    watcher = LineWatcher(lambda line: seen.append(torch.get_num_threads()))
    try:
        with pytest.raises(CheckpointError):
            run(Settings(Path("unused")), watcher, checkpoint=Path("/no/such/checkpoint"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [inside]


def test_it_learns(finished):
    summary, _, _ = finished
    assert summary.accuracy_before <= 0.40
    assert summary.accuracy_after >= summary.accuracy_before + 0.2
    assert summary.merged_agreement >= 0.95  # of 48 images; the bar of 0.99 is for a finished run


def test_the_merged_folder_reads_what_the_summary_says(finished):
    summary, folder, _ = finished
    model = AutoModelForImageTextToText.from_pretrained(folder / "merged", dtype=torch.float32)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    test = writings(IMAGES, 3, test=True)
    answers = transcribe(model, AutoProcessor.from_pretrained(folder / "merged"), [w.image for w in test])
    assert exact_match(answers, [w.text for w in test]) == pytest.approx(summary.accuracy_merged, abs=0.03)


def test_merged_from_folders_it_reads_exactly_as_the_trained_model(finished, tmp_path):
    """Train, merge onto what training saw, reload by stock transformers: the accuracy on the test set is equal."""
    summary, folder, _ = finished
    merged = save_pretrained_merged(folder / "adapter", tmp_path / "merged", base="dequantized", progress=False)
    model = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
    test = writings(IMAGES, 3, test=True)
    answers = transcribe(model, AutoProcessor.from_pretrained(merged), [w.image for w in test])
    assert exact_match(answers, [w.text for w in test]) == summary.accuracy_after


def test_the_adapter_loads_in_plain_peft_and_trains_both_towers(finished):
    _, folder, _ = finished
    base = AutoModelForImageTextToText.from_pretrained(shipped_checkpoint(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    learned = [name for name, value in model.named_parameters() if "lora_B" in name and value.abs().sum() > 0]
    for part in ("visual.blocks.0.attn", "visual.blocks.3.mlp", "language_model.layers.0.self_attn", "layers.3.mlp"):
        assert any(part in name for name in learned), part


@pytest.mark.parametrize(("wrong", "named"), [({"steps": 0}, "--steps 0"), ({"seed": -1}, "--seed -1")])
def test_settings_that_cannot_be_used(tmp_path, wrong, named):
    with pytest.raises(ConfigError, match=named):
        Settings(tmp_path, **wrong)


def test_a_missing_checkpoint_leaves_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here"):
        run(Settings(tmp_path / "out"), LineWatcher(print), checkpoint=tmp_path / "nothing-here")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_json_object_and_keeps_an_earlier_run(tmp_path, fvlm):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    done = fvlm("quickstart", "--output", "out", "--steps", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 1
    assert summary["test_images"] >= 200
    assert summary["output_dir"] == "out-2"
    assert (tmp_path / "out-2" / "report.html").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert "Train …" in done.stderr


def test_the_command_refuses_in_one_sentence(tmp_path, fvlm):
    done = fvlm("quickstart", "--steps", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "fvlm: --steps 0 trains nothing: give at least 1."
    assert not list(tmp_path.iterdir())
