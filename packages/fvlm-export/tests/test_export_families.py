"""Every family: the merged folder answers as the adapter model does, and what no adapter touches keeps its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fvlm_core.testing import FAMILIES
from fvlm_export import read_report, save_pretrained_merged


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_equal_adapter_logits_in_fp32(tools: Any, tmp_path: Path, family: str) -> None:
    base = tools.checkpoint(family)
    model = tools.adapted(tools.load(base))
    expected = tools.logits(model, base)
    with model.disable_adapter():
        unadapted = tools.logits(model, base)
    assert tools.distance(unadapted, expected) > 0.01, "the adapter must matter, or the test shows nothing"
    out = save_pretrained_merged(model, tmp_path / "out", tools.processor(base), progress=False)
    assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5

    before, after = stored(base), stored(out)
    assert after.keys() == before.keys(), "the output keeps the checkpoint's own tensor names"
    same = [name for name in before if torch.equal(before[name], after[name])]
    report = read_report(out)
    assert len(same) == len(before) - report.merged
    assert report.merged_onto == "live"

    model.save_pretrained(tmp_path / "adapter")
    from_folder = save_pretrained_merged(tmp_path / "adapter", tmp_path / "again", base=base, progress=False)
    again = stored(from_folder)
    assert all(torch.equal(again[name], after[name]) for name in after), "from folders and from memory: the same bytes"


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_bf16_and_4bit(tools: Any, tmp_path: Path, family: str) -> None:
    base = tools.checkpoint(family, torch.bfloat16)
    model = tools.adapted(tools.load(base))
    expected = tools.logits(model, base)
    out = save_pretrained_merged(model, tmp_path / "out", progress=False)
    merged = tools.load(out)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    # one bf16 rounding in every layer on each path: a few times 2^-8 of the largest logit
    assert tools.distance(tools.logits(merged, out), expected) < 0.05

    packed = save_pretrained_merged(model, tmp_path / "nf4", save_method="merged_4bit", progress=False)
    reloaded = tools.load(packed)
    linears = [m for m in reloaded.modules() if type(m).__name__ == "Linear4bit"]
    assert linears
    weight = linears[0].weight
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested
    if family not in ("qwen2_vl", "mllama", "gemma3"):
        assert bool(torch.isfinite(tools.logits(reloaded, packed)).all())
        return  # the comparison below takes a second a family, and nothing in it depends on the family
    stock = tools.load(out, quantization_config=reloaded.config.quantization_config)
    for ours, theirs in zip(linears, (m for m in stock.modules() if type(m).__name__ == "Linear4bit"), strict=True):
        assert torch.equal(ours.weight.data, theirs.weight.data), "the same bytes as quantizing while loading"
    assert torch.equal(tools.logits(reloaded, packed), tools.logits(stock, out))


def test_lora_reloads_with_peft(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = tools.adapted(tools.load(base))
    out = save_pretrained_merged(model, tmp_path / "out", tools.processor(base), save_method="lora", progress=False)
    again = PeftModel.from_pretrained(tools.load(base), out)
    assert torch.equal(tools.logits(again, base), tools.logits(model, base))
    assert (out / "chat_template.jinja").is_file()
