"""`train.report_to` with wandb and trackio themselves, without a network: what they keep is what the run logged.

`nox -s trackers` installs them and sets FVLM_TRACKERS=1, with which one that is missing fails; elsewhere it is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CONFIG = """
model: {name: base, precision: 16bit}
lora: {r: 2}
data: {train: train.jsonl, limit: 2}
train: {max_steps: 2, per_device_train_batch_size: 1, gradient_accumulation_steps: 1, warmup_steps: 0}
save: {output_dir: run}
"""


def records(log: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format behind seven bytes of wandb's own."""
    block, header = 32768, 7
    position, parts = header, []
    while position + header <= len(log):
        left = block - position % block
        if left < header:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        parts.append(log[position + header : position + header + length])
        position += header + length
        if kind in (1, 4):  # a record in one piece, or its last
            yield b"".join(parts)
            parts = []


def kept_by_wandb(folder: Path) -> list[float]:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    losses = []
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        losses += [json.loads(items["train/loss"])] if "train/loss" in items else []
    return losses


def kept_by_trackio(folder: Path) -> list[float]:
    (path,) = folder.glob("trackio/*.db")
    with sqlite3.connect(path) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize(
    ("name", "kept"), [("wandb", kept_by_wandb), ("trackio", kept_by_trackio)], ids=["wandb", "trackio"]
)
def test_a_tracker_keeps_what_the_run_logged(
    fvlm,
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kept: Callable[[Path], list[float]],
) -> None:
    if importlib.util.find_spec(name) is None:
        if os.environ.get("FVLM_TRACKERS") == "1":
            pytest.fail(f"FVLM_TRACKERS=1 and {name} is not installed")
        pytest.skip(f"{name} is not installed; nox -s trackers installs it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "run.yaml").write_text(CONFIG, encoding="utf-8")
    places = [f"model.name={workplace / 'base'}", f"data.train={workplace / 'train.jsonl'}"]
    done = fvlm("train", "run.yaml", *places, f"train.report_to={name}", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished", "what a tracker prints is not part of the record"
    history = json.loads((tmp_path / "run/history.json").read_text(encoding="utf-8"))
    logged = [entry["loss"] for entry in history if "loss" in entry]
    assert len(logged) == 2
    assert kept(tmp_path) == pytest.approx(logged, rel=1e-12)
