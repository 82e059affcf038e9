"""A merged folder has the tensor names that vLLM's loaders take, for bases as published and as transformers now saves.

vLLM cannot run here. What its loaders do with a name was read in its files (docs/guides/serving.md says which): they
change prefixes, and then look the name up among the model's parameters, where q, k and v, and gate and up, are put into
fused ones. Both are put down below as facts; within a tower the parameters are called as the published checkpoints
call them, which the loaders rely on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fvlm_export import save_pretrained_merged

pytestmark = pytest.mark.filterwarnings("ignore")

SINCE_452 = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
QWEN = {**SINCE_452, "model.visual.": "visual."}
LLAVA = {
    **SINCE_452,
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
ATTENTION, GATED = r"self_attn\.(q|k|v|o)_proj", r"mlp\.(gate|up|down)_proj"
DECODER = rf"({ATTENTION}|{GATED}|input_layernorm|post_attention_layernorm)"
TEXT = [
    r"language_model\.model\.(embed_tokens|norm)\.weight",
    rf"language_model\.model\.layers\.\d+\.{DECODER}\.(weight|bias)",
    r"language_model\.lm_head\.weight",
]
NORMED = r"language_model\.model\.layers\.\d+\.self_attn\.(q|k)_norm\.weight"
GEMMA = r"language_model\.model\.layers\.\d+\.(pre|post)_feedforward_layernorm\.weight"
PIXTRAL = [
    r"vision_tower\.(patch_conv|ln_pre)\.weight",
    r"vision_tower\.transformer\.layers\.\d+\.(attention\.(q|k|v|o)_proj|feed_forward\.(gate|up|down)_proj)\.weight",
    r"vision_tower\.transformer\.layers\.\d+\.(attention_norm|ffn_norm)\.weight",
]
SIGLIP = [
    r"vision_tower\.vision_model\.(embeddings\.(patch|position)_embedding|post_layernorm)\.(weight|bias)",
    r"vision_tower\.vision_model\.encoder\.layers\.\d+\."
    r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])\.(weight|bias)",
]
BLOCK = r"visual\.blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.(%s))\.(weight|bias)"


@dataclass(frozen=True)
class Loader:
    """What a model's loader in vLLM does: prefixes that it changes, one after the other; parameters that it has."""

    prefixes: dict[str, str]
    parameters: list[str]

    def unknown(self, names: set[str]) -> list[str]:
        """Return the names that it would have no parameter for."""
        return sorted(name for name in names if not any(re.fullmatch(p, self.mapped(name)) for p in self.parameters))

    def unfilled(self, names: set[str]) -> list[str]:
        """Return the kinds of parameter that no name would fill."""
        mapped = {self.mapped(name) for name in names}
        return [kind for kind in self.parameters if not any(re.fullmatch(kind, name) for name in mapped)]

    def mapped(self, name: str) -> str:
        """Return a name as the loader reads it."""
        for old, new in self.prefixes.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return name


LOADERS = {
    "qwen2_vl": Loader(
        {**QWEN, "model.": "language_model.model."},
        [
            *TEXT[:2],
            r"visual\.patch_embed\.proj\.weight",
            BLOCK % "fc1|fc2",
            r"visual\.merger\.(ln_q|mlp\.0|mlp\.2)\.(weight|bias)",
        ],
    ),
    "qwen2_5_vl": Loader(
        {**QWEN, "model.": "language_model.model."},
        [
            *TEXT,
            r"visual\.patch_embed\.proj\.weight",
            BLOCK % "gate_proj|up_proj|down_proj",
            r"visual\.merger\.(ln_q|mlp\.0|mlp\.2)\.(weight|bias)",
        ],
    ),
    "qwen3_vl": Loader(
        QWEN,
        [
            *TEXT,
            NORMED,
            r"visual\.(patch_embed\.proj|pos_embed)\.(weight|bias)",
            BLOCK % "linear_fc1|linear_fc2",
            r"visual\.(merger|deepstack_merger_list\.\d+)\.(norm|linear_fc1|linear_fc2)\.(weight|bias)",
        ],
    ),
    "mllama": Loader(
        {},
        [
            *TEXT,
            r"multi_modal_projector\.(weight|bias)",
            r"language_model\.model\.layers\.\d+\.(cross_attn\.((q|k|v|o)_proj|(q|k)_norm)\.weight"
            r"|cross_attn_(attn|mlp)_gate)",
            r"vision_model\.(class_embedding|patch_embedding\.weight|layernorm_(pre|post)\.(weight|bias))",
            r"vision_model\.gated_positional_embedding\.(embedding|gate|tile_embedding\.weight)",
            r"vision_model\.(pre|post)_tile_positional_embedding\.(embedding\.weight|gate)",
            r"vision_model\.(transformer|global_transformer)\.layers\.\d+\."
            r"((self_attn\.(q|k|v|o)_proj|mlp\.fc[12]|input_layernorm|post_attention_layernorm)\.(weight|bias)"
            r"|gate_(attn|ffn))",
        ],
    ),
    "pixtral": Loader(LLAVA, [*TEXT, *PIXTRAL, r"multi_modal_projector\.linear_[12]\.(weight|bias)"]),
    "mistral3": Loader(
        {**LLAVA, "model.": "language_model.model."},
        [*TEXT, *PIXTRAL, r"multi_modal_projector\.(norm|linear_[12]|patch_merger\.merging_layer)\.weight"],
    ),
    "gemma3": Loader(
        LLAVA,
        [
            *TEXT[:2],
            NORMED,
            GEMMA,
            *SIGLIP,
            r"multi_modal_projector\.(mm_input_projection_weight|mm_soft_emb_norm\.weight)",
        ],
    ),
}


def published(name: str) -> str:
    """As the Hub has it: SigLIP's tower has one more level than transformers now saves."""
    return re.sub(r"^vision_tower\.(?=embeddings|encoder|post_layernorm)", "vision_tower.vision_model.", name)


def newer(name: str) -> str:
    """As transformers saved it from 4.52 until it learned to go back to the older names."""
    name = published(name)
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model." + name.replace("language_model.model.", "language_model.", 1)
    if name.startswith(("visual.", "vision_tower.", "multi_modal_projector.")):
        return "model." + name
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)


def renamed(base: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """Copy a checkpoint under other tensor names."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def names_of(folder: Path) -> set[str]:
    index = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        if (folder / "model.safetensors.index.json").exists()
        else {"weight_map": load_file(folder / "model.safetensors")}
    )
    return set(index["weight_map"])


CASES = [
    (family, rename) for family in LOADERS for rename in (published, newer) if (family, rename) != ("mllama", newer)
]


@pytest.mark.parametrize(("family", "rename"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_vllm_finds_every_tensor_of_a_merged_folder(
    tools: Any, tmp_path: Path, family: str, rename: Callable[[str], str]
) -> None:
    loader = LOADERS[family]
    base = renamed(tools.checkpoint(family), tmp_path / "base", rename)
    assert not loader.unknown(names_of(base)), "the table is wrong, or the base is not as published"
    model = tools.adapted(tools.load(base))
    model.save_pretrained(tmp_path / "adapter")
    live = save_pretrained_merged(model, tmp_path / "live", progress=False, max_shard_size="1MB")
    stored = save_pretrained_merged(tmp_path / "adapter", tmp_path / "stored", base=base, progress=False)
    for folder in (live, stored):
        assert names_of(folder) == names_of(base)
        assert loader.unknown(names_of(folder)) == []
        assert loader.unfilled(names_of(folder)) == []
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]
        assert "quantization_config" not in config


def test_a_name_that_vllm_lacks_is_seen() -> None:
    """The table can fail: PEFT's own names, a level too many, a bias that there is not."""
    loader = LOADERS["qwen2_vl"]
    wrong = {
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "visual.patch_embed.proj.bias",
    }
    assert loader.unknown(wrong | {"model.layers.0.self_attn.q_proj.weight"}) == sorted(wrong)
    assert len(loader.unfilled(set())) == len(loader.parameters)
