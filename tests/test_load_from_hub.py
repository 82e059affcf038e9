"""Loading from the Hub, played by the Hub of fvlm-export's tests: revision, token, cache, subfolder, foreign code."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from fvlm_core import CheckpointError, ConfigError, origin_of
from fvlm_core.testing import tiny_checkpoint
from fvlm_vision import FastVisionModel

ROOT = Path(__file__).resolve().parent.parent


def hub_tools() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_server", ROOT / "packages/fvlm-export/tests/hub/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def no_such_folder(handler: Any, body: bytes, name: str, revision: str) -> None:
    handler.answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})


SERVER = hub_tools()
# Processors look for a folder of further chat templates.
SERVER.ROUTES.insert(0, ("GET", rf"/api/models/{SERVER.NAME}/tree/([^/]+)/additional_chat_templates", no_such_folder))
hub = SERVER.hub  # the fixture
TOKEN = SERVER.TOKEN


def files(folder: Path, below: str = "") -> dict[str, bytes]:
    return {f"{below}{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two checkpoints of one architecture with other weights, whose processors tell them apart too."""
    root = tmp_path_factory.mktemp("published")
    made = {name: tiny_checkpoint("qwen2_vl", root / name, seed=seed) for seed, name in enumerate(("main", "v2"))}
    (made["v2"] / "chat_template.jinja").write_text("{{ 'of v2' }}")
    return made


@pytest.fixture
def private(hub: Any, checkpoints: dict[str, Path]) -> Any:
    """me/model: private, with a branch."""
    repo = SERVER.Repo(private=True, branches={name: files(folder) for name, folder in checkpoints.items()})
    hub.repos["me/model"] = repo
    return hub


def load(name: str | Path, **options: Any) -> tuple[Any, Any]:
    return FastVisionModel.from_pretrained(name, load_in_16bit=True, dtype=torch.float32, **options)


def weights_are_those_of(model: Any, folder: Path) -> bool:
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    held = model.model.language_model.layers[0].mlp.up_proj
    return torch.equal(getattr(held, "base_layer", held).weight, stored)


def fetched(hub: Any, since: int = 0) -> list[str]:
    return [line for line in hub.seen[since:] if line.startswith("GET") and line.endswith("/model.safetensors")]


def test_revision_and_token_reach_model_and_processor(
    private: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for revision, named in ((None, "main"), ("v2", "v2")):
        model, processor = load("me/model", token=TOKEN, revision=revision, cache_dir=tmp_path / named)
        assert weights_are_those_of(model, checkpoints[named])
        assert (processor.chat_template == "{{ 'of v2' }}") is (named == "v2")
        assert origin_of(model).revision == revision
        assert list((tmp_path / named).rglob("model.safetensors"))  # nowhere else


@pytest.mark.parametrize(
    ("options", "named"),
    [({}, "'me/model'"), ({"token": "hf_ofnobody"}, "'me/model'"), ({"token": TOKEN, "revision": "v9"}, "'v9'")],
    ids=["no token", "wrong token", "no such revision"],
)
def test_what_the_hub_does_not_give(private: Any, tmp_path: Path, options: dict[str, str], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load("me/model", cache_dir=tmp_path, **options)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hf_" not in str(caught.value)


def test_the_cache_is_used_and_passed_over_as_asked(private: Any, tmp_path: Path) -> None:
    options = {"token": TOKEN, "cache_dir": tmp_path / "cache"}
    with pytest.raises(CheckpointError, match="'me/model'"):
        load("me/model", local_files_only=True, **options)
    assert private.seen == []
    load("me/model", **options)
    assert len(fetched(private)) == 1
    before = len(private.seen)
    load("me/model", local_files_only=True, **options)
    assert private.seen[before:] == []
    load("me/model", force_download=True, **options)
    assert fetched(private, since=before)


@pytest.mark.parametrize("local", [False, True])
def test_a_subfolder_is_taken(hub: Any, checkpoints: dict[str, Path], tmp_path: Path, local: bool) -> None:
    hub.add("me/many", {**files(checkpoints["main"]), **files(checkpoints["v2"], "inner/")})
    folder = shutil.copytree(checkpoints["main"], tmp_path / "many")
    shutil.copytree(checkpoints["v2"], folder / "inner")
    place: str | Path = folder if local else "me/many"
    model, processor = load(place, subfolder="inner", cache_dir=tmp_path / "cache")
    assert weights_are_those_of(model, checkpoints["v2"])
    assert processor.chat_template == "{{ 'of v2' }}"


def test_a_revision_beside_a_folder_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="revision='v2' is of the Hub"):
        load(checkpoints["main"], revision="v2")


def test_an_adapter_finds_its_base_at_the_revision_it_was_trained_on(
    private: Any, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", private.url)  # PEFT asks by functions bound at import
    model, _ = load("me/model", revision="v2", token=TOKEN, cache_dir=tmp_path / "first")
    FastVisionModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["revision"] == "v2"
    private.repos["me/adapter"] = SERVER.Repo(private=True, branches={"main": files(tmp_path / "adapter")})
    for place in (tmp_path / "adapter", "me/adapter"):
        again, processor = load(place, token=TOKEN, cache_dir=tmp_path / f"of {type(place).__name__}")
        assert weights_are_those_of(again.get_base_model(), checkpoints["v2"])
        assert processor.chat_template == "{{ 'of v2' }}"


CONFIGURATION = """
from transformers import Qwen2VLConfig

class OddConfig(Qwen2VLConfig):
    model_type = "odd_vl"
"""
MODELING = """
from transformers import Qwen2VLForConditionalGeneration
from .configuration_odd import OddConfig

class OddModel(Qwen2VLForConditionalGeneration):
    config_class = OddConfig
    said = "{said}"
"""


def test_code_of_a_checkpoint_runs_where_it_is_trusted_and_at_its_own_revision(
    hub: Any, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((checkpoints["main"] / "config.json").read_text())
    config |= {
        "model_type": "odd_vl",
        "auto_map": {
            "AutoConfig": "me/code--configuration_odd.OddConfig",
            "AutoModelForImageTextToText": "me/code--modeling_odd.OddModel",
        },
    }
    weights = load(checkpoints["main"])[0].state_dict()  # by the names that no renaming of old layouts is needed for
    del weights["lm_head.weight"]  # tied
    own = {"config.json": json.dumps(config).encode(), "model.safetensors": save(weights, {"format": "pt"})}
    hub.add("me/odd", {**files(checkpoints["main"]), **own})
    code = {
        branch: {
            "configuration_odd.py": CONFIGURATION.encode(),
            "modeling_odd.py": MODELING.format(said=branch).encode(),
        }
        for branch in ("main", "v2")
    }
    hub.repos["me/code"] = SERVER.Repo(branches=code)
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        load("me/odd", cache_dir=tmp_path / "untrusted")
    assert not [line for line in hub.seen if "me/code" in line]
    model, _ = load("me/odd", trust_remote_code=True, code_revision="v2", cache_dir=tmp_path / "trusted")
    assert model.said == "v2"
