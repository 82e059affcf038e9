"""The checkpoint that an interrupted run goes on from."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from fvlm_core.checkpoint import tensor_names
from fvlm_core.errors import CheckpointError

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"
_ZIPPED = ("optimizer.pt", "scheduler.pt")  # torch writes the zip's directory last, so that a torn file has none


def last_complete(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest complete checkpoint in `folder` (None: there is none), and the newer ones that are torn."""
    numbered = [(int(match[1]), path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))]
    torn: list[Path] = []
    for _, path in sorted(numbered, reverse=True):
        if _is_complete(path):
            return path, torn
        torn.append(path)
    return None, torn


def _is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end. The trainer writes its state last."""
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    weights = list(checkpoint.glob("*.safetensors"))
    try:
        for path in weights:
            tensor_names(path)
    except CheckpointError:
        return False
    return bool(weights) and all(zipfile.is_zipfile(checkpoint / name) for name in _ZIPPED)
