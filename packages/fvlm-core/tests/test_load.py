"""Loading equals stock loading in every precision, and quantizes what the facts say and nothing else."""

import json
import logging
import shutil

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from fvlm_core import ConfigError, Precision, load_model, origin_of
from fvlm_core.testing import FAMILIES

# Of each family with a facts file: prefixes of what stays in 16 bit, written out here a second time on purpose.
KEPT = {
    "qwen2_vl": ("model.visual.merger.", "lm_head"),
    "qwen2_5_vl": ("model.visual.merger.", "lm_head"),
    "qwen3_vl": ("model.visual.merger.", "model.visual.deepstack_merger_list.", "lm_head"),
    "mllama": ("model.multi_modal_projector", "lm_head"),
    "pixtral": ("model.multi_modal_projector.", "lm_head"),
    "mistral3": ("model.multi_modal_projector.", "lm_head"),
    "gemma3": ("model.multi_modal_projector.", "lm_head"),
}


def stock_nf4(kept, dtype=torch.float32):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(kept),
    )


@pytest.fixture
def batch():
    """One row of text around the four tokens of one image, for the tiny Qwen2-VL."""

    def build(config):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(300, 500, (1, 24), generator=generator)
        ids[0, 4], ids[0, 5:9] = config.vision_start_token_id, config.image_token_id
        vision = config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "pixel_values": torch.randn(16, width, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }

    return build


def logits(model, batch):
    with torch.no_grad():
        return model(**batch(model.config)).logits


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


STOCK = {
    Precision.NF4: {"quantization_config": stock_nf4(("lm_head", "model.visual.merger"))},
    Precision.INT8: {
        "quantization_config": BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_skip_modules=["lm_head", "model.visual.merger"]
        )
    },
    Precision.HALF: {},
    Precision.FULL: {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", list(Precision))
def test_logits_equal_stock_loading(tiny, batch, precision, dtype):
    options = dict(STOCK[precision])
    if precision is Precision.NF4:
        options["quantization_config"] = stock_nf4(("lm_head", "model.visual.merger"), dtype)
    stock = AutoModelForImageTextToText.from_pretrained(tiny("qwen2_vl"), dtype=dtype, device_map="cpu", **options)
    ours = load_model(tiny("qwen2_vl"), precision=precision, dtype=dtype)
    assert not ours.training
    assert torch.equal(logits(ours, batch), logits(stock, batch))
    assert origin_of(ours).precision is precision
    assert origin_of(ours).dtype == str(dtype).removeprefix("torch.")
    assert all(p.requires_grad == (precision is Precision.FULL) for p in ours.parameters())


@pytest.mark.parametrize("family", sorted(KEPT))
def test_written_facts_quantize_all_but_projector_and_head(tiny, family):
    model = load_model(tiny(family), precision=Precision.NF4)
    for name, module in linears(model).items():
        assert isinstance(module, bnb.nn.Linear4bit) != name.startswith(KEPT[family]), name
        if isinstance(module, bnb.nn.Linear4bit):
            assert (module.weight.quant_type, module.weight.quant_state.nested) == ("nf4", True), name
            assert module.weight.dtype is torch.uint8


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(KEPT)))
def test_derived_facts_quantize_every_linear_of_the_blocks(tiny, family):
    """A block's linears are quantized; the projector and the head are not. No name takes its neighbour with it."""
    from fvlm_core.arch import facts_for

    model = load_model(tiny(family), precision=Precision.NF4)
    facts = facts_for(model)
    assert facts.generic
    kept = {name for name, module in linears(model).items() if type(module) is nn.Linear}
    assert kept == {
        name
        for name in linears(model)
        if any(name == path or name.startswith(f"{path}.") for path in facts.unquantized)
    }
    quantized = [name for name in linears(model) if name not in kept]
    for part in ("q_proj", "k_proj", "v_proj"):
        assert any(name.endswith(part) for name in quantized)
    assert "lm_head" in kept


def test_a_derived_name_does_not_take_what_starts_alike(tiny, tmp_path, monkeypatch):
    from dataclasses import replace

    import fvlm_core.arch
    from fvlm_core.arch import derive_facts

    monkeypatch.setattr(fvlm_core.arch, "facts_by_type", lambda *types: None)
    monkeypatch.setattr(
        fvlm_core.arch,
        "facts_for",
        lambda model: replace(derive_facts(model), unquantized=("lm_head", "model.visual.blocks.0.mlp.fc")),
    )
    model = load_model(tiny("qwen2_vl"), precision=Precision.NF4)
    assert isinstance(model.get_submodule("model.visual.blocks.0.mlp.fc1"), bnb.nn.Linear4bit)


@pytest.fixture(scope="module", params=[Precision.NF4, Precision.INT8], ids=str)
def stored(request, tiny, tmp_path_factory):
    """A checkpoint that stock transformers saved with its weights quantized."""
    folder = tmp_path_factory.mktemp("stored") / request.param.value
    model = AutoModelForImageTextToText.from_pretrained(
        tiny("qwen2_vl"), dtype=torch.float32, device_map="cpu", **STOCK[request.param]
    )
    model.save_pretrained(folder)
    return folder, request.param, model


@pytest.mark.parametrize("explicit", [False, True])
def test_a_quantized_checkpoint_loads_as_it_is(stored, batch, explicit):
    folder, precision, stock = stored
    model = load_model(folder, precision=precision if explicit else None)
    assert torch.equal(logits(model, batch), logits(stock, batch))
    origin = origin_of(model)
    assert origin.source_quantized
    assert origin.precision is precision
    assert {n for n, m in linears(model).items() if type(m) is nn.Linear} == {
        "lm_head",
        "model.visual.merger.mlp.0",
        "model.visual.merger.mlp.2",
    }


@pytest.mark.parametrize("asked", [Precision.HALF, Precision.FULL, "other"])
def test_another_precision_of_a_quantized_checkpoint_is_refused(stored, asked):
    folder, precision, _ = stored
    if asked == "other":
        asked = Precision.INT8 if precision is Precision.NF4 else Precision.NF4
    with pytest.raises(ConfigError, match=rf"{asked.argument}=True does not fit .* stored in {precision.value}"):
        load_model(folder, precision=asked)


def rewrite(folder, target, rename, skip_modules):
    """Copy a quantized checkpoint with other tensor names and another list of unquantized modules."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file(
        {rename(name): tensor for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skip_modules
    (target / "config.json").write_text(json.dumps(config))
    return target


def old_name(name):
    """How Qwen2-VL checkpoints named their tensors before transformers 4.52."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def test_a_model_in_evaluation_stays_trainable(tiny, batch, monkeypatch):
    """bitsandbytes would pack the weights anew on a CPU with AVX512-BF16, and pass no gradient on from then on."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", bnb.functional.has_avx512bf16)  # conftest.py turns it off
    model = load_model(str(tiny("qwen2_vl")), precision=Precision.NF4)
    inputs = batch(model.config)
    model.get_input_embeddings().weight.requires_grad_(True)
    gradients = []
    for _ in range(2):
        model(**inputs).logits.float().square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
        model.get_input_embeddings().weight.grad = None
        with torch.no_grad():
            model.eval()(**inputs)
        model.train()
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "skip_modules",
    [["lm_head", "visual.merger"], ["lm_head", "merger", "multi_modal_projector"], ["lm_head"], None],
    ids=["old names", "bare names", "incomplete", "none"],
)
def test_a_quantized_checkpoint_of_an_older_layout_loads_as_it_is(stored, batch, tmp_path, skip_modules):
    folder, _, stock = stored
    old = rewrite(folder, tmp_path / "old", old_name, skip_modules)
    assert torch.equal(logits(load_model(old), batch), logits(stock, batch))


def test_the_computing_dtype_of_a_quantized_checkpoint_is_the_chosen_one(stored):
    folder, precision, _ = stored
    model = load_model(folder, dtype=torch.bfloat16)
    quantized = (bnb.nn.Params4bit, bnb.nn.Int8Params)
    assert {p.dtype for p in model.parameters() if not isinstance(p, quantized)} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    if precision is Precision.NF4:
        assert {m.compute_dtype for m in linears(model).values() if isinstance(m, bnb.nn.Linear4bit)} == {
            torch.bfloat16
        }


def test_the_token_is_nowhere_afterwards(tiny, tmp_path, caplog):
    token = "hf_tokenthatmustnotleak"
    with caplog.at_level(logging.DEBUG):
        model = load_model(tiny("qwen2_vl"), precision=Precision.HALF, token=token)
    model.save_pretrained(tmp_path)
    held = [repr(vars(module)) for module in model.modules()] + [repr(origin_of(model)), str(model.config.to_dict())]
    held += [path.read_text() for path in tmp_path.glob("*.json")] + [caplog.text]
    assert not any(token in text for text in held)


@pytest.mark.gpu
def test_a_model_is_placed_on_the_gpu_in_bfloat16(tiny):
    model = load_model(tiny("qwen2_vl"), precision=Precision.NF4)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model.dtype is torch.bfloat16
    assert model.model.language_model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16
