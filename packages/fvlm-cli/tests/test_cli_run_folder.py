"""A run's folder: what may be written over, what appears only whole, and which checkpoint is resumed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fvlm_cli.config.schema import DataSection, EvalSection, LoraSection, ModelSection, SaveSection, TrainConfig
from fvlm_cli.evaluation.rows import scores_of
from fvlm_cli.training.resume import last_complete
from fvlm_cli.training.run_folder import RunFolder, whole
from fvlm_core.errors import ConfigError, DataError


def config(folder: Path, r: int = 4, overwrite: bool = False) -> TrainConfig:
    return TrainConfig(
        model=ModelSection(name="base", token="hf_secret"),
        lora=LoraSection(r=r),
        data=DataSection(train="train.jsonl"),
        save=SaveSection(output_dir=str(folder), overwrite=overwrite),
    )


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        RunFolder(tmp_path).check(config(tmp_path), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwriting_removes_what_a_run_left_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.prepare(config(tmp_path), resume=False)
    folder.write_record({"status": "finished"})
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").touch()
    (tmp_path / "thesis.txt").touch()
    folder.prepare(config(tmp_path, overwrite=True), resume=False)
    assert not folder.adapter.exists()
    folder.forget_earlier()
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "thesis.txt"}
    assert "hf_secret" not in folder.config.read_text(encoding="utf-8")


def test_a_run_is_resumed_with_the_same_adapters_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match="no run to resume"):
        folder.check(config(tmp_path), resume=True)
    folder.prepare(config(tmp_path), resume=False)
    folder.check(config(tmp_path), resume=True)
    with pytest.raises(ConfigError, match=r"lora\.r=4 and the config says 8"):
        folder.check(config(tmp_path, r=8), resume=True)


def test_what_a_resumed_run_reads_may_be_damaged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for junk in (b"\xff\xfe", b"{"):
        folder.config.write_bytes(junk)
        with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
            folder.check(config(tmp_path), resume=True)
    answers = tmp_path / "before.jsonl"
    for junk in (b"\xff\xfe", b"{", b"[]", b"{}", b"[" * 200_000):
        answers.write_bytes(junk)
        with pytest.raises(DataError, match=r"before\.jsonl is damaged"):
            scores_of(answers, EvalSection())


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "run").check(config(tmp_path / "run", overwrite=True), resume=False)


def test_a_run_that_breaks_off_leaves_nothing_or_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare(config(folder.root), resume=False)
    folder.write_record({"status": "running"})
    folder.checkpoints.mkdir()
    folder.break_off({"status": "running"})
    assert not folder.root.exists()
    folder.prepare(config(folder.root), resume=False)
    checkpoint(folder.checkpoints, 3)
    folder.break_off({"status": "running", "rows": 8})
    assert json.loads(folder.record.read_text(encoding="utf-8")) == {"status": "failed", "rows": 8}
    assert last_complete(folder.checkpoints)[0] is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    other = RunFolder(tmp_path / "other")
    other.prepare(config(other.root), resume=False)
    other.break_off({})
    assert [path.name for path in other.root.iterdir()] == ["thesis.txt"]


def test_a_run_that_breaks_off_without_results_puts_the_earlier_one_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.prepare(config(tmp_path), resume=False)
    folder.write_record({"status": "finished"})
    checkpoint(folder.checkpoints, 3)
    folder.adapter.mkdir()
    (tmp_path / "report.html").write_text("a report", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):  # the first is killed: nothing of it is done after its beginning
        folder.prepare(config(tmp_path, r=8, overwrite=True), resume=False)
        folder.write_record({"status": "running"})
        assert not any(path.exists() for path in before if path not in (folder.config, folder.record))
    folder.break_off({"status": "running"})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert folder.adapter.is_dir()
    folder.prepare(config(tmp_path, overwrite=True), resume=False)
    checkpoint(folder.checkpoints, 5)
    folder.break_off({})
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run.json", "checkpoints"}
    assert [path.name for path in folder.checkpoints.iterdir()] == ["checkpoint-5"]


def test_a_folder_that_cannot_be_written_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError) as caught:
        RunFolder(tmp_path / "new" / "run").check(config(tmp_path), resume=False)
    assert caught.value.filename == str(tmp_path)


def break_off(target: Path) -> None:
    with whole(target) as partial:
        (partial / "weights").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt


def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with whole(target) as partial:
        (partial / "weights").write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        break_off(target)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (target / "weights").read_text(encoding="utf-8") == "old"
    with whole(target) as partial:
        (partial / "other").touch()
    assert [path.name for path in target.iterdir()] == ["other"]


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": np.zeros(8)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        with zipfile.ZipFile(path / name, "w") as file:
            file.writestr("data", "x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, name: str) -> None:
    complete, torn = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_complete(tmp_path) == (torn, [])
    content = (torn / name).read_bytes()
    (torn / name).write_bytes(content[:-10])
    assert last_complete(tmp_path) == (complete, [torn])
    (torn / name).unlink()
    assert last_complete(tmp_path) == (complete, [torn])


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "nowhere") == (None, [])
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete(tmp_path) == (None, [])
