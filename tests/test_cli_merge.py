"""`fvlm merge` through the installed script: every option does to the result what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fvlm_export import read_report, save_pretrained_merged
from fvlm_vision import FastVisionModel


@pytest.fixture(scope="module")
def trained(qwen2_vl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with an adapter over 4-bit weights, and the adapter's folder, which holds no processor."""
    folder = tmp_path_factory.mktemp("merge") / "adapter"
    model, _ = FastVisionModel.from_pretrained(str(qwen2_vl_folder), load_in_4bit=True, dtype="bfloat16")
    model = FastVisionModel.get_peft_model(model, r=2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param += 0.05
    model.save_pretrained(str(folder))
    return model, folder


def merge(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = str(Path(sys.executable).with_name("fvlm"))
    return subprocess.run(
        [script, "merge", *words, "--json"],
        cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_every_option_is_honoured(trained: Any, qwen2_vl_folder: Path, tmp_path: Path) -> None:
    model, folder = trained
    done = merge(
        str(folder), "--output", "out", "--base", "dequantized", "--dtype", "float32", "--max-shard-size", "300KB",
        "--no-verify", "--adapter", f"{folder}=0.5", "--processor", str(qwen2_vl_folder),
        "--data", "me/receipts", "--data", "scans.jsonl", "--metric", "exact match=0.75", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert Path(json.loads(done.stdout)["output_dir"]) == out
    report = read_report(out)
    assert report.merged_onto == "dequantized"
    assert report.verified == {}
    assert [facts["weight"] for facts in report.adapters.values()] == [0.5]
    assert report.data == ["me/receipts", "scans.jsonl"]
    assert report.metrics == {"exact match": 0.75}
    assert len(report.files) > 2
    assert (out / "chat_template.jinja").is_file()
    live = save_pretrained_merged(
        model, tmp_path / "live", base="dequantized", dtype="float32", adapters={"default": 0.5}, progress=False
    )
    expected = load_file(live / "model.safetensors")
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)

    again = merge(str(folder), "--output", "out", cwd=tmp_path)
    assert again.returncode != 0
    assert "--overwrite" in again.stderr or "overwrite=True" in again.stderr
    over = merge(str(folder), "--output", "out", "--overwrite", "--save-method", "lora", cwd=tmp_path)
    assert over.returncode == 0, over.stderr
    assert read_report(out).save_method == "lora"


@pytest.mark.parametrize("option", ["--metric", "--adapter"])
def test_what_is_no_number_is_refused(trained: Any, tmp_path: Path, option: str) -> None:
    done = merge(str(trained[1]), "--output", "out", option, "good=much", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{option} 'good=much' is not of the form NAME=NUMBER" in done.stderr
    assert not (tmp_path / "out").exists()
