"""What an adapter is merged onto: originals, dequantized weights, old and new names, and never the wrong base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fvlm_core.errors import CheckpointError, ConfigError, ExportError
from fvlm_core.load import load_model
from fvlm_core.origin import Origin, origin_of, set_origin
from fvlm_core.precision import Precision
from fvlm_core.testing import tiny_checkpoint
from fvlm_export import note_of, read_report, save_pretrained_merged

pytestmark = pytest.mark.filterwarnings("ignore")
Q = "model.layers.0.self_attn.q_proj.weight"


def rename(folder: Path, to: Path, new_name: Callable[[str], str], file: str = "model.safetensors") -> Path:
    shutil.copytree(folder, to)
    save_file({new_name(k): v for k, v in load_file(folder / file).items()}, to / file, metadata={"format": "pt"})
    return to


def to_modules(name: str) -> str:
    """Qwen2-VL's stored names as its modules are called today."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def test_both_layouts_of_a_checkpoint_keep_their_names(tools: Any, tmp_path: Path) -> None:
    old = tools.checkpoint()
    new = rename(old, tmp_path / "new", to_modules)
    model = tools.adapted(tools.load(old), target_modules=["q_proj", "qkv"])
    expected = tools.logits(model, old)
    model.save_pretrained(tmp_path / "adapter")
    for base in (old, new):
        out = save_pretrained_merged(tmp_path / "adapter", tmp_path / f"from-{base.name}", base=base, progress=False)
        assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
        assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5
        live = tools.adapted(tools.load(base), target_modules=["q_proj", "qkv"])
        out = save_pretrained_merged(live, tmp_path / f"live-{base.name}", progress=False)
        assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "new", "old"),
    [
        ("qwen2_vl", "model.language_model.", "model."),
        ("qwen2_vl", "model.visual.", "visual."),
        ("gemma3", "model.language_model.", "language_model.model."),
        ("gemma3", "model.vision_tower.", "vision_tower."),
    ],
)
def test_an_adapter_with_older_names_finds_its_tensors(
    tools: Any, tmp_path: Path, family: str, new: str, old: str
) -> None:
    base = tools.checkpoint(family)
    model = tools.adapted(tools.load(base), target_modules=["q_proj", "qkv"])
    expected = tools.logits(model, base)
    model.save_pretrained(tmp_path / "adapter")
    shown = f"base_model.model.{new}"
    aged = rename(
        tmp_path / "adapter",
        tmp_path / "aged",
        lambda name: name.replace(shown, f"base_model.model.{old}"),
        "adapter_model.safetensors",
    )
    names = load_file(aged / "adapter_model.safetensors")
    assert any(name.startswith(f"base_model.model.{old}") for name in names)
    out = save_pretrained_merged(aged, tmp_path / "out", base=base, progress=False)
    assert tools.distance(tools.logits(tools.load(out), out), expected) < 1e-5


def test_four_bit_load_merges_onto_the_original(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint(dtype=torch.bfloat16)
    model = tools.adapted(load_model(base, precision=Precision.NF4, dtype="bfloat16", device_map="cpu"))
    norm = model.get_base_model().model.language_model.norm.weight
    norm.data *= 1.5  # trained in place: it must travel too
    out = save_pretrained_merged(model, tmp_path / "out", tools.processor(base), progress=False)
    report = read_report(out)
    assert report.merged_onto == "original"
    assert "quantized to 4 bit while loading" in report.why
    assert report.overridden == ["model.language_model.norm.weight"]
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * 2
    assert torch.equal(after[Q], (before[Q].float() + delta).bfloat16()), "added in fp32, rounded once"
    assert torch.equal(after["model.norm.weight"], norm.data)
    untouched = [n for n in before if not any(t in n for t in (*tools.targets, "model.norm"))]
    assert untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with pytest.raises(ConfigError, match="not empty"):
        save_pretrained_merged(model, out, progress=False)


@pytest.mark.parametrize("precision", [Precision.NF4, Precision.INT8])
def test_dequantized_gives_what_training_saw(tools: Any, tmp_path: Path, precision: Precision) -> None:
    base = tools.checkpoint()
    model = tools.adapted(load_model(base, precision=precision, device_map="cpu"))
    expected = tools.logits(model, base)
    out = save_pretrained_merged(model, tmp_path / "out", base="dequantized", progress=False)
    # int8 quantizes activations as well, which no stored weight can reproduce
    limit = 1e-5 if precision is Precision.NF4 else 0.1
    assert tools.distance(tools.logits(tools.load(out), out), expected) < limit
    assert read_report(out).merged_onto == "dequantized"


def save_noted(model: Any, folder: Path) -> Path:
    """Save an adapter as the models of fvlm-vision do."""
    model.save_pretrained(folder)
    note_of(model).write(folder)
    return folder


@pytest.mark.parametrize(("dtype", "load"), [(torch.float16, "float32"), (torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("precision", [Precision.NF4, Precision.INT8])
def test_a_folder_gives_what_training_saw_too(
    tools: Any, tmp_path: Path, precision: Precision, dtype: torch.dtype, load: str
) -> None:
    """The base is quantized once more, shard by shard, as the adapter's note says; no model is loaded."""
    base = tools.checkpoint(dtype=dtype)
    model = tools.adapted(load_model(base, precision=precision, dtype=load, device_map="cpu"))
    live = save_pretrained_merged(model, tmp_path / "live", base="dequantized", progress=False)
    adapter = save_noted(model, tmp_path / "adapter")
    out = save_pretrained_merged(adapter, tmp_path / "out", base="dequantized", progress=False)
    a, b = load_file(live / "model.safetensors"), load_file(out / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_report(out).merged_onto == "dequantized"
    assert f"quantized to {precision.value[0]} bit as in training" in read_report(out).why
    original = save_pretrained_merged(adapter, tmp_path / "original", progress=False)
    assert not torch.equal(load_file(original / "model.safetensors")[Q], b[Q])


def test_a_folder_that_does_not_say_how_is_not_guessed_at(tools: Any, adapter: Path, tmp_path: Path) -> None:
    base = tools.checkpoint()
    with pytest.raises(ConfigError, match=r"no fvlm_adapter.json .* says how the base was quantized"):
        save_pretrained_merged(adapter, tmp_path / "out", base="dequantized", progress=False)
    half = tools.adapted(load_model(base, precision=Precision.HALF, device_map="cpu"))
    with pytest.raises(ConfigError, match="were not quantized"):
        save_pretrained_merged(
            save_noted(half, tmp_path / "half"), tmp_path / "out", base="dequantized", progress=False
        )
    (tmp_path / "half" / "fvlm_adapter.json").write_text('{"bose": 1}')
    with pytest.raises(CheckpointError, match=r"fvlm_adapter.json cannot be read"):
        save_pretrained_merged(tmp_path / "half", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", [Precision.NF4, Precision.INT8])
def test_a_quantized_checkpoint_is_dequantized(tools: Any, tmp_path: Path, precision: Precision) -> None:
    base = tools.checkpoint(dtype=torch.float16)
    load_model(base, precision=precision, dtype="float16", device_map="cpu").save_pretrained(tmp_path / "quantized")
    tools.processor(base).save_pretrained(tmp_path / "quantized")
    model = load_model(tmp_path / "quantized", precision=precision, dtype="float16", device_map="cpu")
    origin = origin_of(model)
    assert origin is not None
    assert origin.source_quantized
    model = tools.adapted(model)
    expected = tools.logits(model, base)
    live = save_pretrained_merged(model, tmp_path / "live", tools.processor(base), progress=False)
    model.save_pretrained(tmp_path / "adapter")
    folder = save_pretrained_merged(tmp_path / "adapter", tmp_path / "folder", progress=False)
    a, b = load_file(live / "model.safetensors"), load_file(folder / "model.safetensors")
    assert a.keys() == b.keys() == load_file(base / "model.safetensors").keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_report(live).merged_onto == read_report(folder).merged_onto == "dequantized"
    assert "quantization_config" in (tmp_path / "quantized" / "config.json").read_text()
    for out in (live, folder):
        assert "quantization_config" not in (out / "config.json").read_text(), "at no level: its weights are 16-bit"
        assert tools.distance(tools.logits(tools.load(out), out), expected) < (
            0.03 if precision is Precision.NF4 else 0.2
        )


def test_a_four_bit_model_is_written_in_four_bit(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint(dtype=torch.bfloat16)
    model = tools.adapted(load_model(base, precision=Precision.NF4, dtype="bfloat16", device_map="cpu"))
    out = save_pretrained_merged(
        model, tmp_path / "out", tools.processor(base), save_method="merged_4bit", progress=False
    )
    reloaded = load_model(out, device_map="cpu", dtype="bfloat16")
    held = {n for n, m in reloaded.named_modules() if type(m).__name__ == "Linear4bit"}
    names = {n for n, m in model.get_base_model().named_modules() if type(m).__name__ == "Linear4bit"}
    assert held == {name.removesuffix(".base_layer") for name in names}


def other_base(tools: Any, tmp_path: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of the same shapes and other values."""
    return tiny_checkpoint("qwen2_vl", tmp_path / "other", dtype=dtype, seed=5)


def test_the_wrong_base_is_refused(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    other = other_base(tools, tmp_path, torch.float32)
    model = tools.adapted(load_model(base, precision=Precision.NF4, device_map="cpu"))
    noted = save_noted(model, tmp_path / "noted")
    with pytest.raises(ExportError, match="not the checkpoint it was trained on"):
        save_pretrained_merged(model, tmp_path / "out", base=other, progress=False)
    origin = origin_of(model)
    assert origin is not None
    set_origin(model.get_base_model(), Origin(str(tmp_path / "gone"), None, origin.precision, False, "float32", False))
    with pytest.raises(CheckpointError, match="base='dequantized'"):
        save_pretrained_merged(model, tmp_path / "out", progress=False)

    adapter = save_pretrained_merged(
        tools.adapted(tools.load(base)), tmp_path / "adapter", tools.processor(base), save_method="lora", progress=False
    )
    for saved in (noted, adapter):
        with pytest.raises(ExportError, match="weights differ"):
            save_pretrained_merged(saved, tmp_path / "out", base=other, progress=False)
    copied = shutil.copytree(base, tmp_path / "copy")
    assert save_pretrained_merged(adapter, tmp_path / "out", base=copied, progress=False).is_dir()


def test_another_architecture_is_refused_by_name(tools: Any, tmp_path: Path) -> None:
    model = tools.adapted(tools.load(tools.checkpoint()), target_modules=["qkv"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not fit Gemma3ForConditionalGeneration"):
        save_pretrained_merged(tmp_path / "adapter", tmp_path / "out", base=tools.checkpoint("gemma3"), progress=False)
    wide = tiny_checkpoint("qwen2_vl", tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="with shape"):
        save_pretrained_merged(tmp_path / "adapter", tmp_path / "out", base=wide, progress=False)
    assert not (tmp_path / "out").exists()


def test_dtype_casts_everything_and_says_so(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    model = tools.adapted(tools.load(base))
    out = save_pretrained_merged(model, tmp_path / "out", dtype="float16", progress=False)
    merged, before = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.float16}
    assert torch.equal(merged["visual.patch_embed.proj.weight"], before["visual.patch_embed.proj.weight"].half())
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float16"


def test_peft_and_we_agree(tools: Any, tmp_path: Path) -> None:
    base = tools.checkpoint()
    tools.adapted(tools.load(base)).save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tools.load(base), tmp_path / "adapter").merge_and_unload()
    out = save_pretrained_merged(tmp_path / "adapter", tmp_path / "out", base=base, progress=False)
    ours = tools.load(out)
    for name, param in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), param, rtol=1e-6, atol=1e-6)
