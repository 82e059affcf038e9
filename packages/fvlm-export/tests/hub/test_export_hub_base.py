"""A base on the Hub: merged without ever holding more of it than a shard or two, and clear when it cannot be had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.errors import CheckpointError
from fvlm_export import read_report, save_pretrained_merged
from fvlm_export.remote import RemoteShard
from fvlm_export.safetensor_file import sha256_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cold_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    return cache


def publish(hub: Any, tools: Any, folder: Path) -> Path:
    """Put the tiny checkpoint on the Hub in small shards."""
    base = folder / "base"
    model = tools.load(tools.checkpoint())
    model.save_pretrained(base, max_shard_size="300KB")
    tools.processor(tools.checkpoint()).save_pretrained(base)
    hub.add("me/base", {path.name: path.read_bytes() for path in base.iterdir()})
    return base


def test_shards_come_and_go(
    hub: Any, tools: Any, adapter: Path, tmp_path: Path, cold_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publish(hub, tools, tmp_path)
    local = save_pretrained_merged(adapter, tmp_path / "local", base=base, max_shard_size="300KB", progress=False)
    out = tmp_path / "out"
    most: list[int] = []
    real = RemoteShard._fetched

    def counted(self: RemoteShard) -> Any:
        file = real(self)
        most.append(len(list(self.path.parent.glob("*.safetensors"))))
        return file

    monkeypatch.setattr(RemoteShard, "_fetched", counted)
    save_pretrained_merged(adapter, out, base="me/base", max_shard_size="300KB", progress=False)
    assert len(list(base.glob("*.safetensors"))) > 4
    assert max(most) <= 2, "a shard or two at a time"
    assert not list(cold_cache.rglob("*.safetensors"))
    names = {path.name for path in local.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert all(sha256_of(out / n) == sha256_of(local / n) for n in names if n.endswith(".safetensors"))
    assert read_report(out).base == "me/base"


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


def test_a_base_that_cannot_be_had(hub: Any, tools: Any, adapter: Path, tmp_path: Path, cold_cache: Path) -> None:
    publish(hub, tools, tmp_path)
    with pytest.raises(CheckpointError, match="'me/other'"):
        save_pretrained_merged(adapter, tmp_path / "out", base="me/other", progress=False)
    hub.fail("GET", r"resolve/[^/]+/model-00003", 403, times=1000)
    with pytest.raises(CheckpointError, match=r"model-00003.* of 'me/base' cannot be had from the Hub \(status 403\)"):
        save_pretrained_merged(adapter, tmp_path / "out", base="me/base", progress=False)
    assert not (tmp_path / "out").exists()
