"""Replacing an older output: what is deleted with it, and what never is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.errors import CheckpointError, ConfigError
from fvlm_export import save_pretrained_merged
from fvlm_export.safetensor_writer import SafetensorWriter

pytestmark = pytest.mark.filterwarnings("ignore")


def merge(adapter: Path, out: Path, base: Path, **kwargs: Any) -> Path:
    return save_pretrained_merged(adapter, out, base=base, progress=False, **kwargs)


def test_overwrite_replaces_the_whole_folder(tools: Any, adapter: Path, tmp_path: Path) -> None:
    base, out = tools.checkpoint(), tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("the user's")
    with pytest.raises(ConfigError, match="overwrite=True"):
        merge(adapter, out, base)
    with pytest.raises(ConfigError, match="holds no model"):
        merge(adapter, out, base, overwrite=True)
    (out / "config.json").write_text("{}")
    assert (out / "keep.txt").read_text() == "the user's"
    with pytest.raises(CheckpointError):
        merge(adapter, out, tmp_path / "nowhere", overwrite=True)
    assert (out / "keep.txt").read_text() == "the user's", "a failed run leaves the old output alone"
    merge(adapter, out, base, overwrite=True)
    assert not (out / "keep.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", ["current", "above the current", "adapter", "base", "another adapter"])
def test_overwrite_never_takes_what_is_read_or_stood_in(
    tools: Any, adapter: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other, here = tools.checkpoint(), tmp_path / "other", tmp_path / "here"
    shutil.copytree(adapter, other)
    (here / "inside").mkdir(parents=True)
    (here / "config.json").write_text("{}")
    monkeypatch.chdir({"current": here, "above the current": here / "inside"}.get(kind, tmp_path))
    out = {"adapter": adapter, "base": base, "another adapter": other}.get(kind, here)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(out).rglob("*"))
    with pytest.raises(ConfigError, match="is or holds"):
        merge(adapter, out, base, overwrite=True, adapters={str(other): 1.0})
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(out).rglob("*")) == before


@pytest.mark.parametrize("live", [True, False], ids=["live", "folder"])
@pytest.mark.parametrize("save_method", ["merged_16bit", "lora"])
def test_overwrite_never_takes_the_base_that_only_the_adapter_names(
    tools: Any, tmp_path: Path, live: bool, save_method: str
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tools.checkpoint(), base)
    model = tools.adapted(tools.load(base))
    model.save_pretrained(adapter)
    before = sorted((path, path.stat().st_mtime_ns) for path in base.rglob("*"))
    with pytest.raises(ConfigError, match="is or holds"):
        save_pretrained_merged(model if live else adapter, base, None, save_method, overwrite=True, progress=False)
    assert sorted((path, path.stat().st_mtime_ns) for path in base.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("old", [True, False], ids=["an older model", "nothing"])
def test_a_link_stays_and_what_it_points_to_is_written(tools: Any, adapter: Path, tmp_path: Path, old: bool) -> None:
    there, link = tmp_path / "disk" / "there", tmp_path / "link"
    there.parent.mkdir()
    link.symlink_to(there)
    if old:
        there.mkdir()
        for name in ("config.json", "older"):
            (there / name).write_text("{}")
    assert merge(adapter, link, tools.checkpoint(), overwrite=old) == link
    assert link.readlink() == there
    assert (there / "model.safetensors").is_file()
    assert not (there / "older").exists()
    assert [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path, there.parent)] == [
        ["disk", "link"],
        ["there"],
    ]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_came_into_the_output_meanwhile_is_left_alone(
    tools: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out, real = tmp_path / "out", SafetensorWriter.finish

    def meanwhile(self: SafetensorWriter) -> Any:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("the user's")
        return real(self)

    monkeypatch.setattr(SafetensorWriter, "finish", meanwhile)
    with pytest.raises(ConfigError, match="was filled by another meanwhile"):
        merge(adapter, out, tools.checkpoint(), overwrite=overwrite)
    assert [path.read_text() for path in out.iterdir()] == ["the user's"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
