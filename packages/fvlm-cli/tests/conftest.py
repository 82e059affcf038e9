"""What the command's tests share: the installed script, a tiny checkpoint, and data that fits it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Run = Callable[..., "subprocess.CompletedProcess[str]"]

SCRIPT = Path(sys.executable).with_name("fvlm")


@pytest.fixture(scope="session")
def fvlm_command() -> list[str]:
    """The console script of this environment, as the start of a command line."""
    return [str(SCRIPT)]


@pytest.fixture(scope="session")
def fvlm(fvlm_command: list[str]) -> Run:
    """Run `fvlm` with the given words in the given folder, offline, and return what it printed."""

    def run(*words: str, cwd: Path, timeout: float = 300, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        return subprocess.run(
            [*fvlm_command, *words],
            cwd=cwd,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen2-VL in `base`, and eight images with answers in `train.jsonl`."""
    from fvlm_core.testing import tiny_checkpoint

    root = tmp_path_factory.mktemp("workplace")
    tiny_checkpoint("qwen2_vl", root / "base")
    (root / "images").mkdir()
    rows = []
    for number in range(8):
        Image.new("RGB", (56, 56), (30 * number, 20, 200)).save(root / f"images/{number}.png")
        image = {"type": "image", "image": f"images/{number}.png"}
        question = {"role": "user", "content": [image, {"type": "text", "text": "total amount?"}]}
        rows.append({"messages": [question, {"role": "assistant", "content": f"invoice {number}"}]})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def handwriting_run(fvlm: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tiny VLM trained for a few steps on real handwritten digits, with its answers before and after.

    The folder holds `config.yaml`, `train.jsonl`, `images`, and the run in `run`.
    """
    from fvlm_cli.quickstart.folders import shipped_checkpoint
    from fvlm_cli.quickstart.handwriting import writings

    root = tmp_path_factory.mktemp("handwriting-run")
    (root / "images").mkdir()
    rows = []
    for number, writing in enumerate(writings(24, 0, test=False)):
        writing.image.save(root / f"images/{number:02}.png")
        question = [{"type": "image", "image": f"images/{number:02}.png"}, {"type": "text", "text": "Read the text."}]
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": writing.text}]}
        )
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "config.yaml").write_text(
        f"""
model: {{name: {shipped_checkpoint()}, precision: 16bit, max_seq_length: 128, gradient_checkpointing: false}}
data: {{train: train.jsonl, eval_fraction: 0.25, train_on_responses_only: true}}
train:
  {{per_device_train_batch_size: 6, gradient_accumulation_steps: 1, max_steps: 8, learning_rate: 2e-3, warmup_steps: 0}}
eval: {{rows: 5, max_new_tokens: 8, batch_size: 3}}
save: {{output_dir: run}}
""",
        encoding="utf-8",
    )
    done = fvlm("train", "config.yaml", "--quiet", cwd=root)
    assert done.returncode == 0, done.stderr
    return root
