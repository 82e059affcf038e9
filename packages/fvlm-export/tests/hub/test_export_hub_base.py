"""A base on the Hub: merged without ever holding more of it than a shard or two, and clear when it cannot be had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.checkpoint import find_source
from fvlm_core.errors import CheckpointError
from fvlm_core.load import load_model
from fvlm_core.precision import Precision
from fvlm_export import read_report, save_pretrained_merged
from fvlm_export.bases import CheckpointBase
from fvlm_export.remote import RemoteShard
from fvlm_export.safetensor_file import sha256_of
from fvlm_export.safetensor_writer import SafetensorWriter

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cold_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    return cache


def publish(hub: Any, tools: Any, folder: Path, model: Any = None) -> Path:
    """Put the tiny checkpoint, or a model made of it, on the Hub in small shards."""
    base = folder / "base"
    model = tools.load(tools.checkpoint()) if model is None else model
    model.save_pretrained(base, max_shard_size="300KB")
    tools.processor(tools.checkpoint()).save_pretrained(base)
    hub.add("me/base", {path.name: path.read_bytes() for path in base.iterdir()})
    return base


def watch_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the base's shards on the disk whenever one has been fetched."""
    most: list[int] = []
    real = RemoteShard._download

    def counted(self: RemoteShard) -> Path:
        path = real(self)
        most.append(len(list(path.parent.glob("*.safetensors"))))
        return path

    monkeypatch.setattr(RemoteShard, "_download", counted)
    return most


def test_shards_come_and_go(
    hub: Any, tools: Any, adapter: Path, tmp_path: Path, cold_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publish(hub, tools, tmp_path)
    local = save_pretrained_merged(adapter, tmp_path / "local", base=base, max_shard_size="300KB", progress=False)
    out = tmp_path / "out"
    most = watch_disk(monkeypatch)
    save_pretrained_merged(adapter, out, base="me/base", max_shard_size="300KB", progress=False)
    assert len(list(base.glob("*.safetensors"))) > 4
    assert max(most) <= 2, "a shard or two at a time"
    assert not list(cold_cache.rglob("*.safetensors"))
    names = {path.name for path in local.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert all(sha256_of(out / n) == sha256_of(local / n) for n in names if n.endswith(".safetensors"))
    assert len(most) == len(list(base.glob("*.safetensors"))), "each was fetched once"
    report = read_report(out)
    assert (report.base, report.base_revision) == ("me/base", hub.commit_of("main")), "the commit, not the branch"


@pytest.mark.parametrize("precision", [Precision.NF4, Precision.INT8])
def test_a_quantized_base_comes_and_goes_too(
    hub: Any,
    tools: Any,
    adapter: Path,
    tmp_path: Path,
    cold_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
) -> None:
    """What its tensors will be is read from the states alone, a few bytes each."""
    model = load_model(tools.checkpoint(), precision=precision, dtype="float16", device_map="cpu")
    base = publish(hub, tools, tmp_path, model)
    assert len(list(base.glob("*.safetensors"))) > 2
    local = save_pretrained_merged(adapter, tmp_path / "local", base=base, max_shard_size="300KB", progress=False)
    most = watch_disk(monkeypatch)
    out = save_pretrained_merged(adapter, tmp_path / "out", base="me/base", max_shard_size="300KB", progress=False)
    assert max(most) <= 2
    assert len(most) == len(list(base.glob("*.safetensors")))
    assert read_report(out).files == read_report(local).files
    assert read_report(out).merged_onto == "dequantized"


def test_a_killed_merge_of_a_hub_base_goes_on(
    hub: Any, tools: Any, adapter: Path, tmp_path: Path, cold_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, tools, tmp_path)
    out, work = tmp_path / "out", tmp_path / ".out.unfinished"

    class Killed(BaseException):
        pass

    def killed(self: CheckpointBase, slots: Any) -> None:
        if len(list(work.glob("*.safetensors"))) == 3:
            shutil.copytree(work, tmp_path / "left")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointBase, "keep", killed)
        with pytest.raises(Killed):
            save_pretrained_merged(adapter, out, base="me/base", max_shard_size="300KB", progress=False)
    (tmp_path / "left").rename(work)  # as SIGKILL leaves it
    written: list[str] = []
    real = SafetensorWriter.finish
    monkeypatch.setattr(SafetensorWriter, "finish", lambda self: written.append(self.path.name) or real(self))
    save_pretrained_merged(adapter, out, base="me/base", max_shard_size="300KB", progress=False)
    names = sorted(read_report(out).files)
    assert written == names[3:]
    assert sorted(path.name for path in tmp_path.glob(".out*")) == []


@pytest.mark.parametrize("status", [429, 500])
def test_a_base_is_asked_for_again_when_the_hub_stumbles(
    hub: Any,
    tools: Any,
    adapter: Path,
    tmp_path: Path,
    cold_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    """While headers, states and shards are read: two failures each, of kinds that pass."""
    monkeypatch.setattr("fvlm_export.retry.time.sleep", lambda seconds: None)
    model = load_model(tools.checkpoint(), precision=Precision.NF4, dtype="float16", device_map="cpu")
    publish(hub, tools, tmp_path, model)
    for shard in ("model-00001", "model-00002"):
        hub.fail("GET", rf"resolve/[^/]+/{shard}", status, times=2)
    real = RemoteShard._range
    hurt: list[str] = []

    def stumbling(self: RemoteShard, begin: int, end: int) -> bytes:
        if not hurt:
            hurt.append(self._name)
            hub.fail("GET", rf"resolve/[^/]+/{self._name}", status, times=2)
        return real(self, begin, end)

    monkeypatch.setattr(RemoteShard, "_range", stumbling)
    out = save_pretrained_merged(adapter, tmp_path / "out", base="me/base", max_shard_size="300KB", progress=False)
    assert hurt
    assert all(fault.times == 0 for fault in hub.faults), "every failure was met"
    assert tools.load(out) is not None


def test_an_adapter_that_names_its_hub_base(
    hub: Any, tools: Any, adapter: Path, tmp_path: Path, cold_cache: Path
) -> None:
    publish(hub, tools, tmp_path)
    own = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "me/base"}))
    out = save_pretrained_merged(own, tmp_path / "out", progress=False)
    assert tools.load(out) is not None
    assert not (out / ".base").exists()


def test_a_base_that_cannot_be_had(
    hub: Any, tools: Any, adapter: Path, tmp_path: Path, cold_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, tools, tmp_path)
    with pytest.raises(CheckpointError, match="'me/other'"):
        save_pretrained_merged(adapter, tmp_path / "out", base="me/other", progress=False)
    source = find_source("me/base")  # its config is in the cache now
    for method, shard in (("HEAD", "model-00002"), ("GET", "model-00003")):
        hub.fail(method, rf"resolve/[^/]+/{shard}", 403, times=1000)
        with pytest.raises(CheckpointError, match=rf"{shard}.* of 'me/base' cannot be had from the Hub \(status 403\)"):
            save_pretrained_merged(adapter, tmp_path / "out", base="me/base", progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("fvlm_export.retry.time.sleep", lambda seconds: pytest.fail("nobody comes back from offline"))
    with pytest.raises(CheckpointError, match=r"cannot be had from the Hub \(OfflineModeIsEnabled\)"):
        RemoteShard(source, "model-00001-of-00009.safetensors", tmp_path)
