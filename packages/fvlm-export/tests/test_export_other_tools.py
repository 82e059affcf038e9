"""Adapters of other tools: plain PEFT by paths and patterns, Unsloth's, with names of before transformers 4.52."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fvlm_core.errors import CheckpointError
from fvlm_export import save_pretrained_merged

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = "adapter_model.safetensors"
TEXT_THEN, TEXT_NOW = "model.layers.", "model.language_model.layers."
PARTS = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
LEAVES = "(?:k_proj|q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|proj|fc1|fc2)"
# The shape of pattern that Unsloth writes: towers by words in their paths, else a text model's layers by number
UNSLOTH = (
    rf"(?:.*?(?:vision|image|visual|patch|language|text).*?{PARTS}.*?{LEAVES}.*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.{PARTS}\.(?:{LEAVES}))"
)


def rewritten(folder: Path, *, older: bool, **config: Any) -> Path:
    """Give an adapter another config, and its tensors the names of before transformers 4.52."""
    if older:
        prefix = "base_model.model."
        then = {
            name.replace(f"{prefix}model.language_model.", f"{prefix}model.").replace(
                f"{prefix}model.visual.", f"{prefix}visual."
            ): value
            for name, value in load_file(folder / WEIGHTS).items()
        }
        save_file(then, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


CASES: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    # how it was trained; whether its names are older; what its config says
    "Unsloth": ({"target_modules": UNSLOTH}, False, {}),
    "Unsloth, older": ({"target_modules": UNSLOTH}, True, {}),
    "all linears": ({"target_modules": "all-linear"}, True, {}),
    "names": ({"target_modules": ["q_proj", "qkv"]}, True, {}),
    "a pattern": (
        {"target_modules": ["q_proj", "qkv"]},
        True,
        {"target_modules": r"(?:model\.layers|visual\.blocks)\..*(?:q_proj|qkv)"},
    ),
    "paths": (
        {"target_modules": rf"{TEXT_NOW}1\.(self_attn\.q_proj|mlp\.up_proj)".replace("model.l", r"model\.l")},
        True,
        {"target_modules": [f"{TEXT_THEN}1.self_attn.q_proj", f"{TEXT_THEN}1.mlp.up_proj"]},
    ),
    "ranks by path": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {f"{TEXT_NOW}0.self_attn.q_proj": 2},
            "alpha_pattern": {f"{TEXT_NOW}1.self_attn.v_proj": 3},
        },
        True,
        {
            "rank_pattern": {f"{TEXT_THEN}0.self_attn.q_proj": 2},
            "alpha_pattern": {r"^model\.layers\.1\.self_attn\.v_proj": 3},
        },
    ),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, True, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_another_tool_merges(tools: Any, tmp_path: Path, case: str) -> None:
    trained, older, config = CASES[case]
    base = tools.checkpoint()
    model = tools.adapted(tools.load(base), **trained)
    expected = tools.logits(model, base)
    assert tools.distance(tools.logits(tools.load(base), base), expected) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    adapter = rewritten(
        tmp_path / "adapter",
        older=older,
        # a base that is not here, a mapping that only its tool reads, and a key that no PEFT knows
        base_model_name_or_path="unsloth/qwen2-vl-2b-instruct-unsloth-bnb-4bit",
        auto_mapping={"base_model_class": "Qwen2VLForConditionalGeneration", "unsloth_fixed": True},
        unknown_key=1,
        **config,
    )
    out = save_pretrained_merged(adapter, tmp_path / "out", base=base, progress=False)
    assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5


@pytest.mark.parametrize("case", ["Unsloth, older", "a pattern", "paths"])
def test_what_such_a_config_asks_for_and_the_file_lacks_is_named(tools: Any, tmp_path: Path, case: str) -> None:
    trained, older, config = CASES[case]
    base = tools.checkpoint()
    tools.adapted(tools.load(base), **trained).save_pretrained(tmp_path / "adapter")
    adapter = rewritten(tmp_path / "adapter", older=older, **config)
    tensors = load_file(adapter / WEIGHTS)
    lost = f"base_model.model.{TEXT_THEN}1.self_attn.q_proj.lora_B.weight"
    del tensors[lost]
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks '.*layers\.1\.self_attn\.q_proj\.lora_B\.weight'"):
        save_pretrained_merged(adapter, tmp_path / "out", base=base, progress=False)
    assert not (tmp_path / "out").exists()
