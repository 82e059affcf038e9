"""Two shards written side by side: the same bytes, and one that fails breaks off the other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fvlm_core.errors import ExportError
from fvlm_export import build, read_report, save_pretrained_merged, write
from fvlm_export.safetensor_file import SafetensorFile, sha256_of
from fvlm_export.safetensor_writer import SafetensorWriter

pytestmark = pytest.mark.filterwarnings("ignore")


def merge(adapter: Path, out: Path, base: Path, **kwargs: Any) -> Path:
    return save_pretrained_merged(adapter, out, base=base, progress=False, max_shard_size="1200KB", **kwargs)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small shards count as worth two threads, on any machine."""
    monkeypatch.setattr(write, "_WORTH", 0)
    monkeypatch.setattr(write, "_cores", lambda: 4)


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> set[frozenset[str]]:
    """Which files were open for writing at the same time; the first two wait for each other."""
    both, real = threading.Barrier(2, timeout=20), SafetensorWriter.write
    seen: set[frozenset[str]] = set()
    started: dict[int, str] = {}

    def met_at_first(self: SafetensorWriter, name: str, pieces: Iterable[memoryview]) -> None:
        if self.path.name not in started.values() and len(started) < 2:
            started[threading.get_ident()] = self.path.name
            both.wait()
            seen.add(frozenset(started.values()))
        real(self, name, pieces)

    monkeypatch.setattr(SafetensorWriter, "write", met_at_first)
    return seen


def test_two_shards_side_by_side_come_out_as_one_after_the_other(
    tools: Any, adapter: Path, tmp_path: Path, beside: None, request: pytest.FixtureRequest
) -> None:
    base, threads = tools.checkpoint(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(write, "_cores", lambda: 1)
        one = merge(adapter, tmp_path / "one", base)
    met = request.getfixturevalue("met")
    two = merge(adapter, tmp_path / "two", base)
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert met == {frozenset(names[:2])}
    assert {name: sha256_of(two / name) for name in names} == read_report(one).files == read_report(two).files
    assert read_report(two).verified["weights"] == read_report(one).verified["weights"]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("torn", [True, False], ids=["torn", "refused"])
def test_a_shard_that_fails_breaks_off_those_after_it(
    tools: Any,
    adapter: Path,
    tmp_path: Path,
    beside: None,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    torn: bool,
) -> None:
    base, real, done = tools.checkpoint(), SafetensorWriter.write, SafetensorWriter.finish
    names = sorted(p.name for p in merge(adapter, tmp_path / "whole", base).glob("*.safetensors"))
    finished: list[str] = []
    failed = threading.Event()

    def bad(self: SafetensorWriter, name: str, pieces: Iterable[memoryview]) -> None:
        if self.path.name == names[number]:
            failed.set()
            if not torn:
                raise ExportError("a shard fails; merge again.")
            pieces = [memoryview(bytes(piece)[::-1]) for piece in pieces]  # the proof of it fails, a little later
        failed.wait(20)
        real(self, name, pieces)

    monkeypatch.setattr(SafetensorWriter, "write", bad)
    monkeypatch.setattr(SafetensorWriter, "finish", lambda self: finished.append(self.path.name) or done(self))
    before = threading.active_count()
    with pytest.raises(ExportError, match=r"merge again|NaN"):
        merge(adapter, tmp_path / "out", base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    ends = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < ends:
        time.sleep(0.01)  # one that has said all may still be on its way out
    assert threading.active_count() <= before
    if not torn:
        assert names[2] not in finished, "none is begun after the one that failed"
        assert names[0] in finished or number == 0, "the one before it goes on"


@pytest.mark.parametrize(
    ("target", "cores", "size", "lanes"),
    [
        ("q_proj", 8, "1200KB", 3),
        ("q_proj", 8, "500KB", 4),
        ("q_proj", 4, "500KB", 2),
        ("q_proj", 2, "500KB", 1),
        ("q_proj", 8, "1GB", 1),
        ("embed_tokens", 8, "1200KB", 2),  # 512 KB: twice, not three times, in the largest shard
        ("embed_tokens", 8, "500KB", 1),
    ],
)
def test_no_more_tensors_are_at_work_than_a_shard_holds(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, cores: int, size: str, lanes: int
) -> None:
    found: list[int] = []
    base = tools.checkpoint()
    tools.adapted(tools.load(base), target_modules=[target]).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(write, "_WORTH", 0)
    monkeypatch.setattr(write, "_cores", lambda: cores)
    monkeypatch.setattr(build, "lanes_for", lambda plan: found.append(write.lanes_for(plan)) or found[-1])
    save_pretrained_merged(tmp_path / "adapter", tmp_path / "out", base=base, progress=False, max_shard_size=size)
    assert found == [lanes]


@pytest.mark.parametrize("limit", [1_200_000, 700_000, 300_000, 100_000, 1])
def test_shards_are_as_few_as_the_limit_allows_and_about_as_large(
    tools: Any, adapter: Path, tmp_path: Path, limit: int
) -> None:
    base = tools.checkpoint()
    out = save_pretrained_merged(adapter, tmp_path / "out", base=base, progress=False, max_shard_size=limit)
    sizes = [info.nbytes for info in SafetensorFile(base / "model.safetensors").infos.values()]
    held = [[info.nbytes for info in SafetensorFile(path).infos.values()] for path in sorted(out.glob("*.safetensors"))]
    assert [size for shard in held for size in shard] == sizes, "in the base's order"
    assert all(sum(shard) <= limit or len(shard) == 1 for shard in held)
    fewest, room = 0, 0
    for size in sizes:  # filling each shard as far as it goes needs no more than any other way
        fewest, room = (fewest, room - size) if size <= room else (fewest + 1, limit - size)
    assert len(held) == fewest
    largest, average = max(map(sum, held)), sum(sizes) / len(held)
    assert largest <= max(average + max(sizes), max(sizes))
    if limit == 1_200_000:
        assert largest - min(map(sum, held)) < max(sizes), "three, none of them a remainder"


@pytest.mark.parametrize("replaced", [True, False])
def test_an_older_output_is_given_up_only_for_one_that_is_on_the_disk(
    tools: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    base, out = tools.checkpoint(), tmp_path / "out"
    if replaced:
        out.mkdir()
        (out / "config.json").write_bytes(b"{}")
        (out / "model.safetensors").write_bytes(b"old")
    synced: set[tuple[int, int]] = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        found = os.fstat(handle)
        if not replaced or (out / "model.safetensors").exists():  # the older one is still there
            synced.add((found.st_dev, found.st_ino))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    merge(adapter, out, base, overwrite=replaced)
    monkeypatch.undo()
    found = {(path.stat().st_dev, path.stat().st_ino) for path in (out, *out.iterdir())}
    assert len(found) > 8
    assert synced & found == (found if replaced else set())
