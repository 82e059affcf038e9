"""Configs, models and rows for the tests of `fvlm estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from fvlm_cli.config.read import read_config
from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.inspection.opened import Opened, open_model


def config_of(folder: Path, model: Path, *words: str) -> TrainConfig:
    (folder / "config.yaml").write_text(
        f"model: {{name: {model}, precision: 16bit, gradient_checkpointing: false}}\ndata: {{train: rows.jsonl}}\n",
        encoding="utf-8",
    )
    return read_config(folder / "config.yaml", words)


def opened_of(config: TrainConfig) -> Opened:
    opened = open_model(config.model.name)
    vars(opened.skeleton)["max_seq_length"] = config.model.max_seq_length
    return opened


def rows_of(batch: int, side: int, words: int) -> list[dict[str, Any]]:
    image = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    return [{"prompt": "what " * words, "completion": "answer " * words, "images": [image]}] * batch
