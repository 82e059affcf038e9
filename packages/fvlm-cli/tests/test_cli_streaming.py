"""`data.streaming`: rows are read as they are needed, in an order that workers, epochs and resuming agree on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from fvlm_cli.config.schema import DataSection
from fvlm_cli.data import files
from fvlm_cli.data.read import read_data
from fvlm_cli.data.stream import RowStream
from fvlm_core.errors import DataError
from fvlm_vision.loading import errors_of_workers


def write(path: Path, name: str, count: int) -> str:
    lines = [json.dumps({"prompt": f"{name}{n}", "completion": "x"}) for n in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def stream(seed: int = 0, **options: Any) -> RowStream:
    return RowStream(DataSection.model_validate({"streaming": True, **options}), seed)


def prompts(samples: Any) -> list[str]:
    return [sample["prompt"] for sample in samples]


def first(batch: list[Any]) -> Any:
    return batch[0]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    rows = stream(train=[write(tmp_path / "a.jsonl", "a", 60), write(tmp_path / "b.jsonl", "b", 40)], shuffle_buffer=20)
    everything = [f"a{n}" for n in range(60)] + [f"b{n}" for n in range(40)]
    one = prompts(rows)
    assert one != everything
    assert sorted(one) == sorted(everything)
    assert prompts(rows) == one
    rows.set_epoch(1)
    assert prompts(rows) != one
    other = stream(1, train=str(tmp_path / "a.jsonl"), shuffle_buffer=20)
    assert prompts(other) != prompts(stream(train=str(tmp_path / "a.jsonl"), shuffle_buffer=20))
    assert prompts(stream(train=str(tmp_path / "a.jsonl"), shuffle_buffer=1, limit=7)) == everything[:7]


def test_workers_share_the_rows_between_them(tmp_path: Path) -> None:
    rows = stream(train=write(tmp_path / "a.jsonl", "a", 50), shuffle_buffer=5)
    loaded = prompts(DataLoader(rows, batch_size=1, collate_fn=first, num_workers=3))
    assert sorted(loaded) == sorted(prompts(rows))


def test_no_more_is_read_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    seen: list[int] = []

    def counting(path: Path) -> Iterator[Any]:
        for number in range(10_000):
            seen.append(number)
            yield files.Row({"prompt": str(number), "completion": "x"}, f"{path}, row {number}")

    monkeypatch.setitem(files.READERS, ".endless", counting)
    (tmp_path / "a.endless").touch()
    rows = iter(stream(train=str(tmp_path / "a.endless"), shuffle_buffer=10))
    next(rows)
    assert len(seen) == 11
    seen.clear()
    data = DataSection(train=str(tmp_path / "a.endless"), streaming=True)
    train, _ = read_data(data, 0, lambda found, total: found, streamed=25)
    assert (len(train), len(seen)) == (25, 25)

    table = pyarrow.Table.from_pylist([{"prompt": str(n), "completion": "x"} for n in range(1000)])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    found = files.iterate_file(tmp_path / "a.parquet")
    taken = [int(next(found).sample["prompt"]) for _ in range(130)]
    assert taken == list(range(130))


def test_weights_hold_in_a_stream(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", "a", 30), write(tmp_path / "b.jsonl", "b", 600)
    rows = stream(train=[{"path": a, "weight": 1.0}, {"path": b, "weight": 1.0}])
    found = prompts(rows)
    share = sum(name.startswith("a") for name in found) / len(found)
    assert 0.45 < share < 0.55
    assert {name for name in found if name.startswith("b")} == {f"b{n}" for n in range(600)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_named_by_its_place_from_a_worker_too(tmp_path: Path, workers: int) -> None:
    path = Path(write(tmp_path / "a.jsonl", "a", 4))
    path.write_text(path.read_text() + '\n{"prompt": "p"}', encoding="utf-8")
    loader = DataLoader(stream(train=str(path)), batch_size=1, collate_fn=first, num_workers=workers)
    with pytest.raises(DataError) as caught, errors_of_workers():
        list(loader)
    assert str(caught.value).startswith(f"{path}, line 5: ")
    assert "Traceback" not in str(caught.value)


CONFIG = """
model: {name: base, precision: 16bit, max_seq_length: 256, gradient_checkpointing: false}
lora: {r: 4, dropout: 0.1}
data:
  train: [{path: train.jsonl, weight: 2}, {path: more.jsonl, weight: 1}]
  eval: more.jsonl
  streaming: true
  shuffle_buffer: 3
train:
  {per_device_train_batch_size: 1, gradient_accumulation_steps: 1, max_steps: 24, learning_rate: 1e-2,
   warmup_steps: 0, save_steps: 20, eval_steps: 24}
"""


def test_a_streamed_run_goes_on_where_it_stopped(fvlm, workplace: Path) -> None:
    lines = (workplace / "train.jsonl").read_text().splitlines()
    (workplace / "more.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    (workplace / "stream.yaml").write_text(CONFIG, encoding="utf-8")
    done = fvlm("train", "stream.yaml", "save.output_dir=streamed", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["rows"], record["eval_rows"], record["steps"]) == (None, 2, 24)
    assert record["epochs"] > 1  # it went through the stream more than once

    shutil.copytree(workplace / "streamed", workplace / "again")
    shutil.rmtree(workplace / "again/checkpoints/checkpoint-24")
    shutil.rmtree(workplace / "again/adapter")
    done = fvlm("train", "stream.yaml", "save.output_dir=again", "--resume", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-20" in done.stderr

    def losses(run: str) -> list[float]:
        return [
            entry["loss"] for entry in json.loads((workplace / run / "history.json").read_text()) if "loss" in entry
        ]

    assert losses("again") == losses("streamed")

    looked = fvlm("preview", "stream.yaml", "--json", "--check", "6", cwd=workplace)
    assert looked.returncode == 0, looked.stderr
    found = json.loads(looked.stdout)
    assert (found["rows"], found["streamed"], found["fates"]["whole"]) == (6, True, 6)
    needed = fvlm("estimate", "stream.yaml", "--json", "--rows", "4", cwd=workplace)
    assert needed.returncode == 0, needed.stderr
    assert json.loads(needed.stdout)["rows_looked_at"] == 4
