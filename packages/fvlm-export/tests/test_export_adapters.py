"""Every kind of adapter: the merged folder answers as the model with the adapter does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from fvlm_core.errors import ConfigError, ExportError
from fvlm_export import read_report, save_pretrained_merged

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 7}, "alpha_pattern": {"v_proj": 3}},
    "bias_all": {"bias": "all", "target_modules": ["q_proj", "qkv"]},
    "bias_lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "qkv"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "qkv"]},
    "modules_to_save": {"modules_to_save": ["merger"], "target_modules": ["q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head_saved": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "embedding_saved": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "tied_saved": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tied_lora": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 9, 200], "target_modules": ["q_proj"]},
    "conv": {"target_modules": ["patch_embed.proj", "q_proj"]},
    "conv_dora": {"target_modules": ["patch_embed.proj", "q_proj"], "use_dora": True},
    "last_layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
}
UNTIES = {"head", "embedding", "embedding_dora", "head_saved", "embedding_saved"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges_from_memory_and_from_its_folder(tools: Any, tmp_path: Path, kind: str) -> None:
    base = tools.checkpoint()
    model = tools.adapted(tools.load(base), **KINDS[kind])
    expected = tools.logits(model, base)
    assert tools.distance(tools.logits(tools.load(base), base), expected) > 1e-3

    out = save_pretrained_merged(model, tmp_path / "live", progress=False)
    assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is (kind not in UNTIES)
    assert bool(read_report(out).untied) == (kind in UNTIES)

    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = save_pretrained_merged(tmp_path / "adapter", tmp_path / "folder", base=base, progress=False)
    assert tools.distance(tools.logits(tools.load(again), again), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "named"),
    [("gemma3", True), ("gemma3", False), ("paligemma", True), ("paligemma", False), ("internvl", True)],
)
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tie_is_cut_in_other_families_too(tools: Any, tmp_path: Path, family: str, named: bool, target: str) -> None:
    """Also where the config does not name the tie, as published ones do not: the class has it by default."""
    base = shutil.copytree(tools.checkpoint(family), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    if not named:
        for level in (config, config["text_config"]):
            level.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config))
    plain = tools.load(base)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    model = tools.adapted(plain, target_modules=[target])
    expected = tools.logits(model, base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = save_pretrained_merged(tmp_path / "adapter", tmp_path / "out", base=base, progress=False)
    assert read_report(out).untied == ["lm_head.weight"]
    # transformers 5 sees from the weights that they are two; other readers go by the config
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert tools.distance(tools.logits(tools.load(out), base), expected) < 1e-5


def test_scaling_is_alpha_over_root_r_for_rslora(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = tools.adapted(tools.load(base), use_rslora=True, r=4, lora_alpha=6, target_modules=["q_proj"])
    out = save_pretrained_merged(model, tmp_path / "out", progress=False, verify=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 6 / math.sqrt(4)
    merged = load_file(out / "model.safetensors")[name].double()
    before = load_file(base / "model.safetensors")[name].double()
    torch.testing.assert_close(merged, before + delta, rtol=0, atol=1e-7)


def test_two_adapters_with_weights(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = tools.adapted(tools.load(base), seed=1)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"]))
    model.base_model.set_adapter(["default", "second"])
    tools.trained(model, seed=2)
    model.save_pretrained(tmp_path / "adapters")
    both = tools.logits(model, base)
    out = save_pretrained_merged(model, tmp_path / "both", progress=False)
    assert tools.distance(tools.logits(tools.load(out), out), both) < 1e-5
    assert set(read_report(out).adapters) == {"default", "second"}

    weights = {"default": 0.5, "second": -1.5}
    first, second = tmp_path / "adapters", tmp_path / "adapters" / "second"
    live = save_pretrained_merged(model, tmp_path / "live", adapters=weights, progress=False)
    verified = read_report(live).verified["logits"]
    assert verified["error"] < verified["limit"], "the model was weighed as the merge was, for the comparison"
    assert torch.equal(tools.logits(model, base), both), "and as before afterwards"
    alone = save_pretrained_merged(model, tmp_path / "alone", adapters={"second": 1.0}, progress=False)
    assert "other adapters" in read_report(alone).verified["logits"]["skipped"]
    folders = save_pretrained_merged(
        first, tmp_path / "weighted", base=base, adapters={str(first): 0.5, str(second): -1.5}, progress=False
    )
    for module in model.modules():
        for adapter, weight in weights.items():
            if isinstance(module, LoraLayer) and adapter in module.scaling:
                module.scaling[adapter] *= weight
    for out in (folders, live):
        assert tools.distance(tools.logits(tools.load(out), out), tools.logits(model, base)) < 1e-5


def test_only_the_active_adapter_is_merged(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = tools.adapted(tools.load(base))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = tools.logits(model, base)
    out = save_pretrained_merged(model, tmp_path / "out", progress=False)
    assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5
    with pytest.raises(ConfigError, match="'third'"):
        save_pretrained_merged(model, tmp_path / "no", adapters={"third": 1.0}, progress=False)


def test_what_no_weight_can_hold_is_refused(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    merged = tools.adapted(tools.load(base))
    merged.merge_adapter()
    with pytest.raises(ExportError, match="unmerge_adapter"):
        save_pretrained_merged(merged, tmp_path / "out", progress=False)
    off = tools.adapted(tools.load(base))
    off.base_model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="disabled"):
        save_pretrained_merged(off, tmp_path / "out", progress=False)
    pissa = get_peft_model(tools.load(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    expected = tools.logits(pissa, base)
    live = save_pretrained_merged(pissa, tmp_path / "pissa", progress=False)
    assert tools.distance(tools.logits(tools.load(live), live), expected) < 1e-5
    pissa.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match="'pissa'"):
        save_pretrained_merged(tmp_path / "adapter", tmp_path / "out", base=base, progress=False)
    assert not (tmp_path / "out").exists()


def test_fully_fine_tuned_model_saves_as_it_is(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = tools.trained(tools.load(base))
    expected = tools.logits(model, base)
    out = save_pretrained_merged(model, tmp_path / "out", max_shard_size="200KB", progress=False)
    assert (out / "model.safetensors.index.json").is_file()
    assert torch.equal(tools.logits(tools.load(out), out), expected)


def test_resized_embedding_travels(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = tools.load(base)
    model.resize_token_embeddings(1100)
    model = tools.adapted(model)
    expected = tools.logits(model, base)
    out = save_pretrained_merged(model, tmp_path / "out", progress=False)
    reloaded = tools.load(out)
    assert reloaded.get_input_embeddings().weight.shape[0] == 1100
    assert tools.distance(tools.logits(reloaded, out), expected) < 1e-5


def test_lora_of_a_named_adapter_lies_at_the_top(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = get_peft_model(tools.load(base), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    tools.trained(model)
    out = save_pretrained_merged(model, tmp_path / "out", save_method="lora", progress=False)
    again = PeftModel.from_pretrained(tools.load(base), out)
    assert torch.equal(tools.logits(again, base), tools.logits(model, base))
