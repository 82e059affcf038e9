"""What a finished folder says about itself: the model card, the record, and where the facts in them come from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fvlm_export import note_training, read_note, read_report, save_pretrained_merged
from fvlm_export.safetensor_file import sha256_of

pytestmark = pytest.mark.filterwarnings("ignore")
METRICS = {"exact match": 0.9453125, "loss": 0.03125}


def test_base_data_method_and_metrics(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    out = save_pretrained_merged(
        tools.adapted(tools.load(base)),
        tmp_path / "handwriting-reader",
        tools.processor(base),
        data=["me/handwriting", "scans.jsonl"],
        metrics=METRICS,
        progress=False,
    )
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.datasets == ["me/handwriting"], "a file is no dataset of the Hub"
    assert card.data.base_model is None, "a folder of this machine is no model of the Hub"
    assert {"fvlm", "merged_16bit"} <= set(card.data.tags)
    assert "# handwriting-reader" in card.text
    assert f"`{base.name}` with a LoRA adapter merged in" in card.text
    assert "Merged onto: live." in card.text
    assert "Trained on: `me/handwriting`, `scans.jsonl`." in card.text
    assert "| exact match | 0.945312 |" in card.text
    assert str(base) not in card.content
    report = read_report(out)
    assert report.data == ["me/handwriting", "scans.jsonl"]
    assert report.metrics == METRICS


def test_what_is_noted_beside_an_adapter_travels(tools: Any, adapter: Path, tmp_path: Path) -> None:
    base = tools.checkpoint()
    own = shutil.copytree(adapter, tmp_path / "own")
    note_training(own, ["me/receipts"], METRICS)
    lora = save_pretrained_merged(own, tmp_path / "lora", save_method="lora", progress=False)
    assert ModelCard.load(lora / "README.md").data.datasets == ["me/receipts"]
    assert read_note(lora).metrics == METRICS
    assert read_note(lora).base_fingerprint, "the base was at hand, so the adapter is tied to it"
    for source in (own, lora):
        out = save_pretrained_merged(source, tmp_path / f"from-{source.name}", base=base, progress=False)
        assert "| loss | 0.03125 |" in (out / "README.md").read_text()
        assert read_report(out).data == ["me/receipts"]
    told = save_pretrained_merged(own, tmp_path / "told", base=base, metrics={"cer": 0.01}, progress=False)
    assert read_report(told).metrics == {"cer": 0.01}
    assert read_report(told).data == ["me/receipts"]


def test_the_record_names_bytes(tools: Any, adapter: Path, tmp_path: Path) -> None:
    base = tools.checkpoint()
    out = save_pretrained_merged(adapter, tmp_path / "out", base=base, max_shard_size="300KB", progress=False)
    report = read_report(out)
    assert report.files == {path.name: sha256_of(path) for path in sorted(out.glob("*.safetensors"))}
    assert report.adapters == {
        adapter.name: {"weight": 1.0, "sha256": sha256_of(adapter / "adapter_model.safetensors")}
    }
    assert report.verified["weights"]["tensors"] == report.tensors
    assert 0 < report.verified["weights"]["largest_error"] < 1e-5
    same, other = (
        save_pretrained_merged(tools.adapted(tools.load(base), seed=seed), tmp_path / f"live-{seed}", progress=False)
        for seed in (0, 1)
    )
    first, second = (read_report(folder).adapters["default"]["sha256"] for folder in (same, other))
    assert len(first) == len(second) == 64
    assert first != second, "the hash is of the adapter's values"


def test_the_record_names_every_adapter_though_their_folders_are_named_alike(tools: Any, tmp_path: Path) -> None:
    base, folders = tools.checkpoint(), [tmp_path / "monday" / "adapter", tmp_path / "tuesday" / "adapter"]
    for seed, folder in enumerate(folders):
        tools.adapted(tools.load(base), seed=seed).save_pretrained(folder)
    weights = {str(folders[0]): 0.25, str(folders[1]): 0.75}
    out = save_pretrained_merged(folders[0], tmp_path / "out", base=base, adapters=weights, progress=False)
    first, second = (sha256_of(folder / "adapter_model.safetensors") for folder in folders)
    assert read_report(out).adapters == {
        "adapter": {"weight": 0.25, "sha256": first},
        "adapter (2)": {"weight": 0.75, "sha256": second},
    }
    assert "2 LoRA adapters" in (out / "README.md").read_text()
