"""Fused layers compute what the layers they stand for compute, in every state that PEFT can bring a layer into."""

import copy
import inspect

import pytest
import torch
from fused_tools import QWEN, adapted_model, assert_equal_step, assert_same_step, make_batch, step
from peft import LoraConfig
from torch import nn

from fvlm_core import CheckpointError, ConfigError, Precision, load_model
from fvlm_core.arch import facts_by_type
from fvlm_core.fused import fuse_model, fusion_report, has_fused_loss, unfuse_model
from fvlm_core.fused.adapted import adapted, why_unfused
from fvlm_core.fused.head import FusedCausalLMOutput


@pytest.fixture(scope="module")
def qwen(tiny):
    return adapted_model(tiny("qwen2_vl"))


@pytest.fixture
def model(qwen):
    """A copy, unfused."""
    return copy.deepcopy(qwen)


@pytest.fixture
def batch(model):
    return make_batch(model.config)


@pytest.mark.parametrize("precision", [Precision.HALF, Precision.NF4], ids=str)
@pytest.mark.parametrize("family", QWEN)
def test_loss_and_gradients_equal_stock_before_and_after(tiny, family, precision):
    model = adapted_model(tiny(family), precision)
    batch = make_batch(model.config)
    stock = step(model, batch)
    report = fuse_model(model)
    kinds = set(report.fused.values())
    assert {"decoder_layer", "attention", "gated_mlp", "rms_norm", "vision_block", "vision_attention"} <= kinds
    assert report.left == {}
    ours = step(model, batch)
    assert_same_step(ours, stock)
    unfuse_model(model)
    assert fusion_report(model).fused == {}
    assert not any("forward" in vars(module) for module in model.modules())
    assert_equal_step(step(model, batch), stock)


@pytest.mark.parametrize("family", QWEN)
def test_bf16_is_no_further_from_fp64_than_stock(tiny, family):
    """Twice stock's error at most, for the loss and for the gradients together."""
    low = adapted_model(tiny(family), dtype=torch.bfloat16)
    exact = copy.deepcopy(low).double()
    batch = make_batch(low.config)
    truth = step(exact, {**batch, "pixel_values": batch["pixel_values"].double()})

    def error(result):
        off = torch.stack([(result[1][name].double() - g).norm() / g.norm() for name, g in truth[1].items()])
        return off.square().mean().sqrt()

    stock = error(step(low, batch))
    fuse_model(low)
    assert error(step(low, batch)) <= 2 * stock


def test_evaluation_and_generation_equal_stock(model, batch):
    model.eval()
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    prompt = {name: value[:1] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else value
              for name, value in prompt.items()}  # fmt: skip
    prompt |= {"pixel_values": batch["pixel_values"][:16], "image_grid_thw": batch["image_grid_thw"][:1]}
    with torch.no_grad():
        logits, loss = model(**batch).logits, model(**batch).loss
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    fuse_model(model)
    with torch.no_grad():
        out = model(**batch)
        torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.loss, loss)
        assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), tokens)


def test_the_output_of_a_training_step_counts_and_has_no_logits(model, batch):
    with torch.no_grad():
        logits = model(**batch).logits
    fuse_model(model)
    assert has_fused_loss(model)
    out = model(**batch)
    assert isinstance(out, FusedCausalLMOutput)
    assert out.logits is None
    learned = batch["labels"][:, 1:] != -100
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]) & learned
    assert out.learned_tokens.tolist() == [int(right.sum()), int(learned.sum())]


def test_the_rows_of_the_loss_may_be_given(model, batch):
    fuse_model(model)
    plain = step(model, batch)
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
    rows = (shifted != -100).nonzero().squeeze(1)
    assert_same_step(step(model, batch, label_rows=rows), plain, tolerance=1e-6)
    model.eval()
    assert model(**batch, label_rows=rows).logits is not None  # a key that stock would not know is taken off


def test_the_loss_is_divided_as_trainers_ask(model, batch):
    fuse_model(model)
    count = int((batch["labels"][:, 1:] != -100).sum())
    mean = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(2 * count)).loss, mean / 2)


@pytest.mark.parametrize("asked", [{"logits_to_keep": 3}, {"return_dict": False}], ids=str)
def test_what_needs_logits_gets_them(model, batch, asked):
    del batch["labels"]
    if "return_dict" in asked:
        batch["labels"] = make_batch(model.config)["labels"]
    stock = model(**batch, **asked)
    fuse_model(model)
    ours = model(**batch, **asked)
    index = 1 if "return_dict" in asked else "logits"
    torch.testing.assert_close(ours[index], stock[index], rtol=1e-4, atol=1e-5)


def test_adapters_can_be_disabled_merged_and_switched(model, batch):
    torch.manual_seed(0)
    model.add_adapter("second", LoraConfig(r=2, target_modules=model.peft_config["default"].target_modules))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.normal_(std=0.05)

    def losses():
        model.set_adapter("default")
        with model.disable_adapter():
            disabled = model(**batch).loss
        first = model(**batch).loss
        model.set_adapter("second")
        second = model(**batch).loss
        model.base_model.merge_adapter()
        merged = model(**batch).loss
        model.base_model.unmerge_adapter()
        model.base_model.set_adapter(["default", "second"])
        both = model(**batch).loss
        model.set_adapter("default")
        return torch.stack([disabled, first, second, merged, both]).detach()

    stock = losses()
    assert len(set(stock[[0, 1, 2, 4]].tolist())) == 4
    fuse_model(model)
    torch.testing.assert_close(losses(), stock, rtol=1e-5, atol=0)


def test_a_hook_on_a_linear_layer_is_called(model, batch):
    fuse_model(model)
    linear = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    seen = []
    linear.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert why_unfused(linear) == "has hooks"
    assert adapted(linear) is None
    model(**batch)
    assert seen == [(2, 24, 128)]


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}, {"bias": "all"}], ids=str
)
def test_other_kinds_of_adapters_are_right(tiny, options):
    model = adapted_model(tiny("qwen2_vl"), **options)
    batch = make_batch(model.config)
    stock = step(model, batch)
    fuse_model(model)
    assert_same_step(step(model, batch), stock)
    linear = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    assert (why_unfused(linear) is not None) == ("use_dora" in options or "lora_bias" in options)


def test_dropout_drops_in_training_alone(tiny):
    model = adapted_model(tiny("qwen2_vl"), lora_dropout=0.5)
    batch = make_batch(model.config)
    fuse_model(model)
    assert step(model, batch)[0] != step(model, batch)[0]
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for dropout in dropouts:
        dropout.p = 0.0  # in place: the layers notice
    assert step(model, batch)[0] == step(model, batch)[0]
    model.eval()
    fused = model(**batch).loss
    unfuse_model(model)
    torch.testing.assert_close(model(**batch).loss, fused)


@pytest.mark.parametrize("frozen", ["vision", "language"])
def test_a_frozen_tower_gets_no_gradient(tiny, frozen):
    targets = ("language",) if frozen == "vision" else ("vision",)
    model = adapted_model(tiny("qwen2_vl"), targets=targets)
    batch = make_batch(model.config)
    stock = step(model, batch)
    fuse_model(model)
    assert_same_step(step(model, batch), stock)


def test_full_finetuning_trains_the_base(tiny):
    model = load_model(tiny("qwen2_vl"), precision=Precision.FULL, device_map="cpu").train()
    batch = make_batch(model.config)
    stock = step(model, batch)
    fuse_model(model)
    ours = step(model, batch)
    torch.testing.assert_close(ours[0], stock[0])
    for name, expected in stock[1].items():
        assert (ours[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


def test_a_text_only_batch(model, batch):
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    text["input_ids"] = text["input_ids"].clamp(300, 499)
    stock = step(model, text)
    fuse_model(model)
    assert_same_step(step(model, text), stock)


def test_a_nan_in_the_input_gives_nan_as_stock_does(model, batch):
    batch["pixel_values"][0, 0] = torch.nan
    stock = step(model, batch)
    fuse_model(model)
    ours = step(model, batch)
    assert stock[0].isnan()
    assert ours[0].isnan()
    assert {n for n, g in ours[1].items() if g.isnan().any()} == {n for n, g in stock[1].items() if g.isnan().any()}


def test_signatures_names_and_state_stay(model):
    names, keys = dict(model.named_modules()).keys(), model.state_dict().keys()
    signature = inspect.signature(model.get_base_model().forward)
    classes = [type(module) for module in model.modules()]
    fuse_model(model)
    assert dict(model.named_modules()).keys() == names
    assert model.state_dict().keys() == keys
    assert [type(module) for module in model.modules()] == classes
    assert inspect.signature(model.get_base_model().forward) == signature


def test_a_module_with_a_forward_of_its_own_keeps_it(model, batch):
    layer = model.base_model.model.model.language_model.layers[0]
    own = layer.mlp.forward
    calls = []
    layer.mlp.forward = lambda x: calls.append(1) or own(x)
    report = fuse_model(model)
    assert list(report.left.values()) == ["has a forward of its own"]
    assert "1 has a forward of its own" in report.summary
    model(**batch)
    assert calls == [1]
    unfuse_model(model)
    assert "forward" in vars(layer.mlp)


def test_a_table_entry_that_matches_nothing_is_an_error(model, monkeypatch):
    facts = facts_by_type("qwen2_vl")
    monkeypatch.setattr("fvlm_core.fused.engine.facts_for", lambda _: facts)
    monkeypatch.setitem(facts.fused, "Qwen2VLGone", "rms_norm")
    with pytest.raises(CheckpointError, match=r"names Qwen2VLGone, which the model does not have: pass fused_layers"):
        fuse_model(model)


def test_loading_fuses_when_told_to(tiny):
    assert fusion_report(load_model(tiny("qwen2_vl"), device_map="cpu")).fused == {}
    assert "task_model" in fusion_report(load_model(tiny("qwen2_vl"), fused_layers=True)).fused.values()
    with pytest.raises(ConfigError, match="fused_layer"):
        load_model(tiny("qwen2_vl"), fused_layer=True)


def test_a_family_without_a_table_is_left_as_it_is(tiny):
    model = load_model(tiny("paligemma"), fused_layers=True)
    assert fusion_report(model).summary == "no fused layers: the family has no table of them"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_places_of_the_images_may_be_given(tiny, family):
    model = adapted_model(tiny(family))
    batch = make_batch(model.config)
    stock = step(model, batch)
    fuse_model(model)
    rows = (batch["input_ids"] == model.config.image_token_id).flatten().nonzero().squeeze(1)
    positions, _ = model.base_model.model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    planned = {**batch, "position_ids": positions, "media_rows": rows, "inputs_embeds": None, "use_cache": False}
    assert_same_step(step(model, planned), stock)
    wrong = {**planned, "media_rows": rows.flip(0)}
    assert step(model, wrong)[0] != stock[0]
    model.eval()
    torch.testing.assert_close(model(**planned).loss, stock[0])
