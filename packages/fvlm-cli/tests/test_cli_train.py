"""`fvlm train`, `merge` and `--resume`, end to end through the installed script on a tiny Qwen2-VL on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

STEPS = 6
CONFIG = f"""
model: {{name: base, precision: 16bit, max_seq_length: 256}}
lora: {{r: 4, alpha: 8}}
data: {{train: train.jsonl, eval_fraction: 0.25}}
train:
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 2
  max_steps: {STEPS}
  learning_rate: 1e-2
  warmup_steps: 0
  save_steps: 100
"""


@pytest.fixture(scope="module")
def trained(fvlm, workplace: Path) -> dict[str, Any]:
    (workplace / "config.yaml").write_text(CONFIG, encoding="utf-8")
    done = fvlm("train", "config.yaml", "save.output_dir=run", "--save.merge", "merged_16bit", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((run / "history.json").read_text()) if "loss" in entry]


def test_a_run_learns_and_leaves_its_record(trained: dict[str, Any], workplace: Path) -> None:
    run = workplace / "run"
    assert (trained["status"], trained["steps"], trained["rows"], trained["eval_rows"]) == ("finished", STEPS, 6, 2)
    assert json.loads((run / "run.json").read_text()) == trained
    assert trained["versions"]["torch"]
    first, *_, last = losses(run)
    assert last < first - 0.5
    assert trained["eval_loss"] < first
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["lora"]["r"] == 4
    assert resolved["lora"]["bias"] == "none"
    assert resolved["save"]["merge"] == "merged_16bit"


def test_adapter_and_merged_model_reload_with_stock_libraries_and_agree(
    trained: dict[str, Any], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.chdir(workplace)
    processor = AutoProcessor.from_pretrained(trained["adapter_dir"])
    block = [{"type": "image"}, {"type": "text", "text": "total amount?"}]
    text = processor.apply_chat_template([{"role": "user", "content": block}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open("images/3.png")], return_tensors="pt")
    base = AutoModelForImageTextToText.from_pretrained("base", dtype=torch.float32)
    with torch.no_grad():
        untrained = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, trained["adapter_dir"])(**inputs).logits
        merged_model = AutoModelForImageTextToText.from_pretrained(trained["merged_dir"], dtype=torch.float32)
        merged = merged_model(**inputs).logits
    assert AutoProcessor.from_pretrained(trained["merged_dir"]).chat_template == processor.chat_template
    scale = adapted.abs().max()
    assert (merged - adapted).abs().max() < 1e-4 * scale
    assert (adapted - untrained).abs().max() > 1e-2 * scale


def test_merge_gives_what_the_run_merged(fvlm, trained: dict[str, Any], workplace: Path) -> None:
    done = fvlm("merge", trained["adapter_dir"], "--output", "merged-later", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["output_dir"]) == workplace / "merged-later"
    later, then = (workplace / name / "model.safetensors" for name in ("merged-later", "run/merged"))
    one, other = load_file(later), load_file(then)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= 1e-6 * other[name].abs().max().clamp(min=1), name


def test_cards_say_what_was_trained_on_and_how_well(fvlm, trained: dict[str, Any], workplace: Path) -> None:
    note = json.loads((workplace / "run/adapter/fvlm_adapter.json").read_text())
    assert note["data"] == ["train.jsonl"]
    assert note["metrics"] == {name: trained[name] for name in ("train_loss", "eval_loss")}
    assert note["base_fingerprint"], "what saving noted is still there"
    done = fvlm("merge", trained["adapter_dir"], "--output", "merged-for-its-card", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    for folder in ("merged-for-its-card", "run/merged"):
        card = (workplace / folder / "README.md").read_text()
        assert "Trained on: `train.jsonl`." in card
        assert f"| eval loss | {trained['eval_loss']:.6g} |" in card.replace("eval_loss", "eval loss")
        assert str(workplace) not in card


def test_ctrl_c_saves_a_checkpoint_and_resume_gives_the_same_losses(
    fvlm, fvlm_command: list[str], trained: dict[str, Any], workplace: Path
) -> None:
    words = ["train", "config.yaml", "save.output_dir=stopped"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*fvlm_command, *words],
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, "".join([*said, stderr])
    assert "fvlm train config.yaml save.output_dir=stopped --resume" in stdout
    record = json.loads((workplace / "stopped/run.json").read_text())
    assert record["status"] == "interrupted"
    assert 2 <= record["steps"] < STEPS
    assert not (workplace / "stopped/adapter").exists()

    torn = workplace / "stopped/checkpoints/checkpoint-99"
    shutil.copytree(workplace / record["checkpoint"], torn)
    (torn / "trainer_state.json").write_text('{"global_step": ', encoding="utf-8")
    other = fvlm(*words, "--resume", "lora.r=8", cwd=workplace)
    assert other.returncode == 2
    assert "lora.r=4" in other.stderr
    done = fvlm(*words, "--resume", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-99 was not written to its end" in done.stderr
    # Two epochs with dropout: the order of the rows and the state of the generators go on too.
    assert losses(workplace / "stopped") == losses(workplace / "run")
    one, other = (load_file(workplace / name / "adapter/adapter_model.safetensors") for name in ("stopped", "run"))
    assert one.keys() == other.keys()
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_a_finished_run_is_not_overwritten_unasked(fvlm, trained: dict[str, Any], workplace: Path) -> None:
    before = (workplace / "run/run.json").read_bytes()
    done = fvlm("train", "config.yaml", "save.output_dir=run", cwd=workplace)
    assert done.returncode == 2
    assert "save.overwrite=true" in done.stderr
    assert (workplace / "run/run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "code", "part"),
    [
        (("lora.target_modules=[no_such_layer]",), 2, "no_such_layer"),
        # Without a GPU nothing is chosen by a budget, which is how it is seen to reach the model.
        (("model.gradient_checkpointing=auto", "model.memory_budget=20.5"), 2, "memory_budget=20.5 has nothing to"),
        (("lora.target_modules=[lm_head]",), 2, "the trainer refuses this config"),
        (("model.device_map=disk",), 2, "model.device_map='disk' leaves weights on the disk"),
        (("model.attn_implementation=fast",), 2, "attn_implementation='fast' is none that a qwen2_vl model can have"),
        (("model.attn_implementation=flash_attention_2",), 4, "needs a package that is not here"),
        (("train.lr_scheduler_type=cosine_with_min_lr",), 2, "the trainer refuses this config: One of min_lr"),
        (("train.optim=galore_adamw",), 4, "galore_torch"),
        (("data.packing=true", "data.overflow=error", "model.max_seq_length=8"), 3, "max_seq_length"),
    ],
)
def test_a_run_that_is_refused_leaves_no_folder_and_an_earlier_run_alone(
    fvlm, trained: dict[str, Any], workplace: Path, settings: tuple[str, ...], code: int, part: str
) -> None:
    done = fvlm("train", "config.yaml", "save.output_dir=refused", *settings, cwd=workplace)
    assert done.returncode == code, done.stderr
    assert part in done.stderr.splitlines()[-1]
    assert not (workplace / "refused").exists()
    before = (workplace / "run/run.json").read_bytes()
    fvlm("train", "config.yaml", "save.output_dir=run", "save.overwrite=true", *settings, cwd=workplace)
    assert (workplace / "run/run.json").read_bytes() == before
    assert (workplace / "run/adapter").is_dir()


def test_a_row_that_breaks_in_training_is_named_by_its_file(fvlm, workplace: Path) -> None:
    good = (workplace / "images/0.png").read_bytes()
    (workplace / "images/torn.png").write_bytes(good[:60])  # its header is whole, its pixels are not
    rows = [json.loads(line) for line in (workplace / "train.jsonl").read_text().splitlines()][:2]
    rows[1]["messages"][0]["content"][0]["image"] = "images/torn.png"
    (workplace / "torn.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (workplace / "config.yaml").write_text(CONFIG, encoding="utf-8")
    settings = ("data.train=torn.jsonl", "data.eval_fraction=null", "save.output_dir=torn", "save.overwrite=true")
    for more in ((), ("train.dataloader_num_workers=1", "data.streaming=true")):  # in this process, and in another
        done = fvlm("train", "config.yaml", *settings, *more, cwd=workplace)
        assert done.returncode == 3, done.stderr
        assert done.stderr.splitlines()[-1].startswith("fvlm: torn.jsonl, line 2: the image")
        assert "Traceback" not in done.stderr
