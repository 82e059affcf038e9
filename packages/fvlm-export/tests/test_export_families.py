"""Every family: the merged folder answers as the adapter model does, and what no adapter touches keeps its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoProcessor

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


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Each adapted module's s·B·A in fp32, by the module's name, worked out from PEFT's layers by hand."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight.float(), module.lora_B["default"].weight.float()
            found[path] = module.scaling["default"] * (b @ a)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_bf16_is_rounded_once(tools: Any, tmp_path: Path, family: str) -> None:
    base = tools.checkpoint(family, torch.bfloat16)
    model = tools.adapted(tools.load(base))
    expected = tools.logits(model, base)
    with model.disable_adapter():
        unadapted = tools.distance(tools.logits(model, base), expected)
    out = save_pretrained_merged(model, tmp_path / "out", progress=False)
    merged = tools.load(out)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    # one bf16 rounding in every layer on each path: a few times 2^-8 of the largest logit
    assert tools.distance(tools.logits(merged, out), expected) < min(0.05, unadapted / 2)
    before = tools.load(base)
    changed = deltas(model)
    assert changed
    for name, delta in changed.items():
        exact = before.get_submodule(name).weight.float() + delta
        # sums in another order may fall on the other side of a rounding: the next bf16 number, and seldom
        torch.testing.assert_close(merged.get_submodule(name).weight.float(), exact, rtol=2**-8 * 1.01, atol=1e-7)
        differing = merged.get_submodule(name).weight != exact.bfloat16()
        assert differing.float().mean() < 0.001, name
    for name, param in before.named_parameters():
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(merged.get_parameter(name), param), name


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_4bit_is_what_stock_makes_of_the_merged_model(tools: Any, tmp_path: Path, family: str) -> None:
    base = tools.checkpoint(family, torch.bfloat16)
    model = tools.adapted(tools.load(base))
    out = save_pretrained_merged(model, tmp_path / "out", verify=False, progress=False)
    packed = save_pretrained_merged(model, tmp_path / "nf4", save_method="merged_4bit", progress=False)
    reloaded = tools.load(packed)
    linears = {n: m for n, m in reloaded.named_modules() if type(m).__name__ == "Linear4bit"}
    assert linears
    assert {(m.weight.quant_state.quant_type, m.weight.quant_state.nested) for m in linears.values()} == {("nf4", True)}
    stock = tools.load(out, quantization_config=reloaded.config.quantization_config)
    others = {n: m for n, m in stock.named_modules() if type(m).__name__ == "Linear4bit"}
    assert linears.keys() == others.keys()
    for name, ours in linears.items():
        assert torch.equal(ours.weight.data, others[name].weight.data), "the same bytes as quantizing while loading"
    assert torch.equal(tools.logits(reloaded, packed), tools.logits(stock, out))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_reloads_with_peft(tools: Any, tmp_path: Path, family: str) -> None:
    base = tools.checkpoint(family)
    model = tools.adapted(tools.load(base))
    out = save_pretrained_merged(model, tmp_path / "out", tools.processor(base), save_method="lora", progress=False)
    again = PeftModel.from_pretrained(tools.load(base), out)
    assert torch.equal(tools.logits(again, base), tools.logits(model, base))
    assert (out / "chat_template.jinja").is_file()
    assert AutoProcessor.from_pretrained(out).chat_template == tools.processor(base).chat_template
