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

    def run(*words: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        return subprocess.run(
            [*fvlm_command, *words],
            cwd=cwd,
            env=environment,
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
