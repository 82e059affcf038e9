"""Models that keep tensors in another form than their checkpoints: experts, transposed or stored one by one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fvlm_export import save_pretrained_merged

pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = "model.language_model.layers.0.mlp.experts"
TARGETS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.fixture(scope="module")
def experts(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with experts."""
    dense = tools.checkpoint("qwen3_vl")
    config = transformers.AutoConfig.from_pretrained(dense)
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    for part in (text, vision):
        part.pop("model_type")
    text.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
    ids = {key: getattr(config, key) for key in config.to_dict() if key.endswith("_token_id")}
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    )
    folder = tmp_path_factory.mktemp("experts") / "model"
    model.save_pretrained(folder)
    tools.processor(dense).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("orientation", ["as the model holds them", "transposed, as the first checkpoints had them"])
def test_fused_experts_merge_in_either_orientation(tools: Any, experts: Path, tmp_path: Path, orientation: str) -> None:
    base = shutil.copytree(experts, tmp_path / "base")
    if orientation.startswith("transposed"):
        tensors = load_file(base / "model.safetensors")
        turned = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
        save_file(turned, base / "model.safetensors", metadata={"format": "pt"})
    model = tools.adapted(tools.load(base), **TARGETS)
    expected = tools.logits(model, base)
    assert tools.distance(tools.logits(tools.load(base), base), expected) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    out = save_pretrained_merged(tmp_path / "adapter", tmp_path / "out", base=base, progress=False)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert not torch.equal(before[f"{EXPERTS}.down_proj"], after[f"{EXPERTS}.down_proj"])
    assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5
    live = save_pretrained_merged(model, tmp_path / "live", progress=False)
    assert tools.distance(tools.logits(tools.load(live), live), expected) < 1e-5


def test_experts_stored_one_by_one_stay_so(tools: Any, tmp_path: Path) -> None:
    """A text model whose checkpoints hold one tensor an expert, which transformers stacks while loading."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    one = "model.layers.1.mlp.experts.3.gate_proj.weight"
    assert one in before
    ids = torch.arange(12)[None]
    model = tools.adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **TARGETS)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    for name, source, base in (("folder", tmp_path / "adapter", tmp_path / "base"), ("live", model, None)):
        out = save_pretrained_merged(source, tmp_path / name, base=base, verify=base is not None, progress=False)
        after = load_file(out / "model.safetensors")
        assert after.keys() == before.keys()
        assert not torch.equal(before[one], after[one])
        with torch.no_grad():
            found = transformers.AutoModelForCausalLM.from_pretrained(out)(ids).logits
        assert tools.distance(found, expected) < 1e-5
