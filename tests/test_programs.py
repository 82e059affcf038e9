"""The four programs of examples/programs, with the arguments printed there and fewer steps, on the shipped model."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset, Features, Image, List, Value
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

PROGRAMS = Path(__file__).resolve().parents[1] / "examples" / "programs"


@pytest.fixture
def programs(monkeypatch):
    """Import the programs as `python examples/programs/X.py` would: from their own folder."""
    monkeypatch.syspath_prepend(str(PROGRAMS))
    names = ("basic", "ocr_training", "language_only", "saving")
    yield {name: __import__(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_basic_adapts_both_towers(programs):
    model, _ = programs["basic"].load(shipped_checkpoint())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any(".visual.blocks.0.attn.qkv.lora_A" in name for name in names)
    assert any(".language_model.layers.3.mlp.down_proj.lora_B" in name for name in names)
    assert all("lora_" in name for name in names)


def test_ocr_training_changes_the_adapter_and_saving_keeps_it(programs, tmp_path):
    folder = tmp_path / "out"
    model, tokenizer, trainer = programs["ocr_training"].train(shipped_checkpoint(), 3, str(folder))
    assert trainer.state.global_step == 3
    assert all(math.isfinite(loss) for loss in losses(trainer))
    moved = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in moved)

    programs["saving"].save(model, tokenizer, tmp_path / "adapter")
    AutoProcessor.from_pretrained(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(shipped_checkpoint(), dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    saved = {name: p for name, p in reloaded.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(saved[name], parameter, rtol=0, atol=0, msg=name)


without_gpu = pytest.mark.skipif(
    trl.__version__.startswith("1.15.") and not torch.cuda.is_available(),
    reason="trl 1.15's own loss launches Triton where there is no GPU",
)


@pytest.mark.parametrize("kind", [FastVisionTrainer, pytest.param(SFTTrainer, marks=without_gpu), Trainer])
def test_stock_trainers_train_the_same_model_with_the_same_collator(kind, programs, tmp_path):
    """What a user of `trl` or `transformers` writes; the first loss is the plain model's under each of them."""
    model, processor = programs["basic"].load(shipped_checkpoint())
    FastVisionModel.for_training(model)
    chats = [row["messages"] for row in programs["ocr_training"].conversations(4)]
    images = [[block.pop("image") for block in chat[1]["content"] if block["type"] == "image"] for chat in chats]
    for block in (block for chat in chats for turn in chat for block in turn["content"]):
        block.setdefault("text", None)  # a table has all columns in all its rows
    text = Value("string")
    turns = List({"role": text, "content": List({"type": text, "text": text})})
    features = Features({"messages": turns, "images": List(Image())})
    rows = Dataset.from_dict({"messages": chats, "images": images}, features=features)
    collator = FastVisionDataCollator(model, processor)
    with torch.no_grad():
        expected = model(**collator(list(rows))).loss.item()
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    if kind is Trainer:
        args = TrainingArguments(**settings)
    else:
        args = SFTConfig(**settings, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True})
    trainer = kind(model=model, args=args, data_collator=collator, train_dataset=rows, processing_class=processor)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=2e-3)  # trl's adapters of a 4-bit model are bfloat16
    assert len(losses(trainer)) == 2
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_language_only_leaves_the_vision_tower_alone(programs, tmp_path):
    model, _, trainer = programs["language_only"].train(shipped_checkpoint(), 2, str(tmp_path / "out"))
    assert trainer.state.global_step == 2
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".visual." in name)
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert trained
    assert all(p.abs().max() > 0 for p in trained.values())


def test_saving_runs_as_a_program(programs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["saving.py", "--steps", "1", "--output", str(out)])
    runpy.run_path(str(PROGRAMS / "saving.py"), run_name="__main__")
    AutoModelForImageTextToText.from_pretrained(out / "merged")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
