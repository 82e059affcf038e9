"""What lies beside the weights of a merged folder: all that its base or its adapter had, and nothing of the work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from fvlm_export import save_pretrained_merged

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = {"README.md", "fvlm_export.json"}
INDEX = "model.safetensors.index.json"


def edited(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


@pytest.fixture
def base(tools: Any, tmp_path: Path) -> Path:
    """A base that nobody would make up: its own settings of generation, template and code."""
    folder = shutil.copytree(tools.checkpoint(), tmp_path / "base")
    edited(folder, "generation_config.json", temperature=0.37, top_k=11)
    edited(folder, "config.json", auto_map={"AutoModel": "modeling_own.Own"})
    (folder / "modeling_own.py").write_text("# the base's own code\n")
    (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + "{# the base's #}")
    return folder


def beside_weights(folder: Path) -> dict[str, bytes]:
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    return {name: content for name, content in kept.items() if name not in OURS | {"config.json", INDEX}}


def test_from_folders_everything_beside_the_weights_is_the_base_s(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = save_pretrained_merged(adapter, tmp_path / "out", base=base, progress=False)
    assert beside_weights(out) == beside_weights(base)
    assert {"generation_config.json", "processor_config.json", "tokenizer.json"} <= beside_weights(out).keys()
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()} | OURS
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert after == before


def test_a_processor_beside_the_adapter_or_handed_over_comes_first(
    tools: Any, adapter: Path, base: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(adapter, tmp_path / "own")
    processor = AutoProcessor.from_pretrained(base)
    processor.chat_template = "{# trained with #}"
    processor.save_pretrained(own)
    beside = save_pretrained_merged(own, tmp_path / "beside", base=base, progress=False)
    handed = save_pretrained_merged(adapter, tmp_path / "handed", processor, base=base, progress=False)
    for out in (beside, handed):
        assert AutoProcessor.from_pretrained(out).chat_template == "{# trained with #}"
        assert beside_weights(out)["generation_config.json"] == beside_weights(base)["generation_config.json"]


def test_from_memory_generation_is_as_the_model_is_set(tools: Any, base: Path, tmp_path: Path) -> None:
    model = tools.adapted(tools.load(base))
    model.generation_config.top_k = 23
    out = save_pretrained_merged(model, tmp_path / "out", tools.processor(base), progress=False)
    written = json.loads((out / "generation_config.json").read_text())
    assert (written["temperature"], written["top_k"]) == (0.37, 23)
    assert tools.load(out).generation_config.top_k == 23
    assert (out / "modeling_own.py").read_bytes() == (base / "modeling_own.py").read_bytes()


def test_the_index_tells_of_every_tensor_where_it_is(adapter: Path, base: Path, tmp_path: Path) -> None:
    out = save_pretrained_merged(adapter, tmp_path / "out", base=base, max_shard_size="300KB", progress=False)
    index = json.loads((out / INDEX).read_text())
    held, size = {}, 0
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  # it is no dict
    assert len(set(held.values())) > 3
    assert index == {"metadata": {"total_size": size}, "weight_map": index["weight_map"]}
    assert index["weight_map"] == held


def test_code_of_a_base_runs_only_where_it_is_trusted(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    (base / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import Qwen2VLForConditionalGeneration\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Own(Qwen2VLForConditionalGeneration): pass\n"
    )
    edited(base, "config.json", auto_map={"AutoModelForImageTextToText": "modeling_own.Own"}, architectures=["Own"])
    tensors = load_file(base / "model.safetensors")  # transformers renames what its own classes load, and nothing else
    named = {re.sub("^model", "model.language_model", name): value for name, value in tensors.items()}
    named = {re.sub("^visual", "model.visual", name): value for name, value in named.items()}
    save_file(named, base / "model.safetensors", metadata={"format": "pt"})
    merged = []
    for trust in (False, True):
        out = tmp_path / f"trusted-{trust}"
        save_pretrained_merged(adapter, out, base=base, trust_remote_code=trust, progress=False)
        assert ran.exists() == trust
        merged.append((out / "model.safetensors").read_bytes())
    assert merged[0] == merged[1]
