"""Killed runs: the old output or the new one, and a rerun that takes over what was finished."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.errors import CheckpointError, ConfigError, ExportError
from fvlm_export import read_report, save_pretrained_merged, write
from fvlm_export.remote import UnreachableError
from fvlm_export.resume import Journal
from fvlm_export.safetensor_file import sha256_of
from fvlm_export.safetensor_writer import SafetensorWriter
from fvlm_export.work_folder import WorkFolder
from fvlm_export.write import write_shards

pytestmark = pytest.mark.filterwarnings("ignore")


def merge(adapter: Path, out: Path, base: Path, **kwargs: Any) -> Path:
    return save_pretrained_merged(adapter, out, base=base, progress=False, **kwargs)


def test_two_runs_do_not_write_the_same_output(tools: Any, adapter: Path, tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", overwrite=False) as work:
        (work.path / "mine").touch()
        with pytest.raises(ConfigError, match="another run"):
            merge(adapter, tmp_path / "out", tools.checkpoint())
        assert (work.path / "mine").exists(), "the second run must not clear the first one's folder"


def test_a_finished_shard_is_taken_over_and_a_damaged_one_is_not(
    tools: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out, work = tools.checkpoint(), tmp_path / "out", tmp_path / ".out.unfinished"
    whole = merge(adapter, tmp_path / "whole", base, max_shard_size="300KB")
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(names) > 3

    class Killed(BaseException):
        pass

    def killed(*args: Any, **kwargs: Any) -> Any:
        for count, pair in enumerate(write_shards(*args, **kwargs)):
            yield pair
            if count == 2:
                shutil.copytree(work, tmp_path / "left")
                raise Killed

    monkeypatch.setattr("fvlm_export.build.write_shards", killed)
    with pytest.raises(Killed):
        merge(adapter, out, base, max_shard_size="300KB")
    monkeypatch.undo()
    (tmp_path / "left").rename(work)  # as SIGKILL leaves it
    with (work / names[1]).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"oops")
    written: list[str] = []
    real = SafetensorWriter.finish
    monkeypatch.setattr(SafetensorWriter, "finish", lambda self: written.append(self.path.name) or real(self))
    merge(adapter, out, base, max_shard_size="300KB")
    assert written == [names[1], *names[3:]], "shards 1 and 3 were finished, 2 was damaged"
    assert {n: sha256_of(out / n) for n in names} == {n: sha256_of(whole / n) for n in names}
    assert not (out / ".journal.jsonl").exists()


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (KeyboardInterrupt(), True),
        (UnreachableError("the Hub does not answer."), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (ExportError("what was written is not what was meant."), False),
        (CheckpointError("a shard of the base is torn."), False),
        (ValueError("a bug"), False),
    ],
)
def test_what_breaks_a_merge_off_leaves_its_finished_shards_and_what_fails_it_does_not(
    tools: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, kept: bool
) -> None:
    base, out, work = tools.checkpoint(), tmp_path / "out", tmp_path / ".out.unfinished"

    def broken_off(*args: Any, **kwargs: Any) -> Any:
        for count, pair in enumerate(write_shards(*args, **kwargs)):
            yield pair
            if count == 1:
                raise error

    monkeypatch.setattr("fvlm_export.build.write_shards", broken_off)
    with pytest.raises(ExportError if isinstance(error, OSError) else type(error)):
        merge(adapter, out, base, max_shard_size="300KB")
    monkeypatch.undo()
    assert not out.exists()
    assert work.exists() == kept
    if not kept:
        return
    assert all(path.name.startswith(".") or path.suffix == ".safetensors" for path in work.iterdir())
    finished = sorted(path.name for path in work.glob("*.safetensors"))
    assert len(finished) == 2
    written: list[str] = []
    real = SafetensorWriter.finish
    monkeypatch.setattr(SafetensorWriter, "finish", lambda self: written.append(self.path.name) or real(self))
    merge(adapter, out, base, max_shard_size="300KB")
    assert written
    assert not set(finished) & set(written)
    assert sorted(path.name for path in out.glob("*.safetensors")) == sorted([*finished, *written])


@pytest.mark.parametrize("other", ["values", "weight", "rows"])
def test_shards_of_another_adapter_are_not_taken_over(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    base, out = tools.checkpoint(), tmp_path / "out"
    first, second = tmp_path / "first", tmp_path / "second"
    config: dict[str, Any] = {"trainable_token_indices": [3, 5]} if other == "rows" else {}
    tools.adapted(tools.load(base), **config).save_pretrained(first)
    if other == "values":
        tools.adapted(tools.load(base), seed=7).save_pretrained(second)
    else:
        shutil.copytree(first, second)
    if other == "rows":  # the file is the same, byte for byte
        noted = json.loads((second / "adapter_config.json").read_text())
        (second / "adapter_config.json").write_text(json.dumps({**noted, "trainable_token_indices": [3, 6]}))
    weights = {str(second): 0.5} if other == "weight" else None
    whole = merge(second, tmp_path / "whole", base, max_shard_size="300KB", adapters=weights)

    def broken_off(*args: Any, **kwargs: Any) -> Any:
        yield from itertools.islice(write_shards(*args, **kwargs), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr("fvlm_export.build.write_shards", broken_off)
    with pytest.raises(KeyboardInterrupt):
        merge(first, out, base, max_shard_size="300KB")
    monkeypatch.undo()
    assert len(list((tmp_path / ".out.unfinished").glob("*.safetensors"))) == 5
    taken: list[bool] = []
    real = Journal.finished

    def watched(self: Journal, name: str) -> Any:
        found = real(self, name)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(Journal, "finished", watched)
    merge(second, out, base, max_shard_size="300KB", adapters=weights)
    assert len(taken) > 5
    assert not any(taken)
    assert read_report(out).files == read_report(whole).files


def run_and_kill(arguments: tuple[Path, Path, Path], after: float | None, lanes: int) -> float:
    """Start a merge in a process of its own, kill it after some seconds, and return how long it ran."""
    process = multiprocessing.get_context("fork").Process(target=merge_small_shards, args=(*arguments, lanes))
    begin = time.monotonic()
    process.start()
    process.join(after)
    process.kill()  # SIGKILL; nothing where it has ended
    process.join()
    if after is None:
        assert process.exitcode == 0
    return time.monotonic() - begin


def merge_small_shards(adapter: Path, out: Path, base: Path, lanes: int) -> None:
    write._WORTH, write._cores = 0, lambda: 2 * lanes  # the process ends with the merge
    merge(adapter, out, base, overwrite=True, max_shard_size="200KB")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def test_sigkill_at_50_random_points(tools: Any, adapter: Path, tmp_path: Path) -> None:
    """Each run is killed somewhere; a merge takes over what killed ones have finished, so later ones get further.

    One half of them write one shard after the other, the other half three side by side.

    The output is another model's until a run gets through, and becomes that again, so that old and new differ.
    """
    base, out, old = tools.checkpoint(), tmp_path / "out", tmp_path / "old"
    merge(base, old, base)  # the base itself, in one file
    arguments = (adapter, out, base)
    shutil.copytree(old, out)
    took = min(run_and_kill(arguments, None, lanes) for lanes in (1, 3))
    before, after = hashes(old), hashes(out)
    assert before.keys() != after.keys()
    rng = random.Random(0)
    shutil.rmtree(out)
    shutil.copytree(old, out)
    ended = {"old": 0, "new": 0, "began": 0}
    for number in range(50):
        run_and_kill(arguments, rng.uniform(0.0, took), 1 + number % 2 * 2)
        found = hashes(out)
        assert found in (before, after), "the old folder or the whole new one, never anything else"
        ended["old" if found == before else "new"] += 1
        ended["began"] += (tmp_path / ".out.unfinished").exists()
        if found == after:
            assert read_report(out).verified["weights"]["tensors"] == read_report(out).tensors
            shutil.rmtree(out)
            shutil.copytree(old, out)
    assert ended["began"] >= 10, "runs were killed in the midst of their work"
    run_and_kill(arguments, None, 3)
    assert hashes(out) == after
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["old", "out"], "the rerun leaves nothing of the killed ones"
