"""The fused layers of Llama 3.2 Vision, Pixtral, Mistral 3 and Gemma 3 compute what their own layers compute."""

import copy

import pytest
import torch
from family_tools import FAMILIES, TRAINED, family_batch, prompt_of, recorded, without_padding_mask
from fused_tools import adapted_model, assert_equal_step, assert_same_step, step

from fvlm_core import Precision, load_model
from fvlm_core.arch import task_model
from fvlm_core.checkpointing import apply_checkpointing
from fvlm_core.fused import fuse_model, has_fused_loss, unfuse_model

KINDS = {
    "mllama": {"decoder_layer", "attention", "cross_layer", "cross_attention", "rms_norm", "checkpointed_encoder"},
    "pixtral": {"decoder_layer", "config_window_attention", "rms_norm", "packed_tower"},
    "mistral3": {"decoder_layer", "config_window_attention", "rms_norm", "packed_tower", "merging_projector"},
    "gemma3": {"sandwich_layer", "attention", "gemma_rms_norm"},
}
EVERYWHERE = {"gated_mlp", "tower_block", "tower_attention", "patch_conv"}


@pytest.fixture(scope="module")
def adapted_families(tiny):
    return {family: adapted_model(tiny(family), targets=TRAINED) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(adapted_families, family):
    """A copy, unfused."""
    return copy.deepcopy(adapted_families[family])


@pytest.fixture
def batch(tiny, family, model):
    return family_batch(tiny(family), model)


@pytest.mark.parametrize("precision", [Precision.HALF, Precision.NF4], ids=str)
def test_loss_and_gradients_equal_stock_before_and_after(tiny, family, precision):
    model = adapted_model(tiny(family), precision, targets=TRAINED)
    batch = family_batch(tiny(family), model)
    stock = step(model, batch)
    report = fuse_model(model)
    assert KINDS[family] | EVERYWHERE <= set(report.fused.values())
    older = not getattr(type(task_model(model)), "accepts_loss_kwargs", True)  # Gemma 3 of transformers 5.15
    own_loss = family == "gemma3" and older
    assert list(report.left.values()) == (["has a loss of its own"] if own_loss else [])
    assert has_fused_loss(model) is not own_loss
    assert_same_step(step(model, batch), stock)
    unfuse_model(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert_equal_step(step(model, batch), stock)


def test_a_text_only_batch(tiny, family, model):
    batch = family_batch(tiny(family), model, images=(0, 0))
    stock = step(model, batch)
    fuse_model(model)
    assert_same_step(step(model, batch), stock)
    assert not any("vision" in name for name in stock[1])


def test_rows_with_and_without_images(tiny, family, model):
    batch = family_batch(tiny(family), model, images=(1, 0) if family != "mllama" else (1, 2))
    stock = step(model, batch)
    fuse_model(model)
    assert_same_step(step(model, batch), stock)


def test_bf16_is_no_further_from_fp64_than_stock(tiny, family):
    """Twice stock's error at most, over all gradients together."""
    low = adapted_model(tiny(family), dtype=torch.bfloat16, targets=TRAINED)
    exact = copy.deepcopy(low).double()
    batch = family_batch(tiny(family), low)
    truth = step(exact, {**batch, "pixel_values": batch["pixel_values"].double()})

    def error(result):
        off = torch.stack([(result[1][name].double() - g).norm() / g.norm() for name, g in truth[1].items()])
        return off.square().mean().sqrt()

    stock = error(step(low, batch))
    fuse_model(low)
    assert 0 < error(step(low, batch)) <= 2 * stock


def test_evaluation_and_generation_equal_stock(tiny, family, model, batch):
    model.eval()
    prompt = prompt_of(tiny(family), model)
    with torch.no_grad():
        stock = model(**batch)
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    fuse_model(model)
    with torch.no_grad():
        ours = model(**batch)
        torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.loss, stock.loss)
        assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), tokens)
    assert tokens.shape[1] > prompt["input_ids"].shape[1] + 1


def test_checkpointed_layers_equal_stock(model, batch):
    stock = step(model, batch)
    fuse_model(model)
    apply_checkpointing(model, True)
    assert_same_step(step(model, batch), stock)


def test_a_checkpointed_model_in_training_mode_generates_what_stock_does(tiny, family, model):
    """Older transformers leave the cache out there; since 5.23 they do so only where gradients are computed."""
    prompt = prompt_of(tiny(family), model)
    apply_checkpointing(model, True)
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    fuse_model(model)
    assert model.training
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), tokens)


def recordings_of(graphs):
    """Class name of the recorded layers → the one length of their recordings, and how many layers there are."""
    found = {}
    for key, kind in graphs._stages.items():
        length, count = found.get(key[0].__name__, (key[1][-2], 0))
        assert key[1][-2] == length
        found[key[0].__name__] = length, count + len(kind.layers)
    return found


@pytest.mark.parametrize("targets", [TRAINED, ("language",)], ids=["all", "language"])
@pytest.mark.parametrize("padded", [True, False], ids=["mask", "no-mask"])
def test_recorded_layers_equal_stock(tiny, family, targets, padded):
    model = adapted_model(tiny(family), targets=targets)
    batch = family_batch(tiny(family), model)
    if not padded:
        batch = without_padding_mask(batch)
    stock = step(copy.deepcopy(model), batch)  # a stock Pixtral tower leaves hooks on its layers
    fuse_model(model)
    graphs = recorded(model)
    for _ in range(3):
        assert_same_step(step(model, batch), stock)
    assert graphs.replayed == 2 * graphs.recorded > 0
    assert_only_text_layers_are_rounded(family, targets, batch["input_ids"].shape[1], graphs)


def assert_only_text_layers_are_rounded(family, targets, tokens, graphs):
    rounded = -(-tokens // 64) * 64
    assert tokens % 64 > 0
    found = recordings_of(graphs)
    if family == "mllama":
        assert found.pop("MllamaSelfAttentionDecoderLayer") == (rounded, 2)
        if targets == TRAINED:  # the image features carry a gradient
            assert "MllamaCrossAttentionDecoderLayer" not in found
        else:
            assert found.pop("MllamaCrossAttentionDecoderLayer") == (tokens, 2)
        assert found.pop("MllamaVisionEncoderLayer")[1] == 5
    elif family == "gemma3":  # image tokens see each other both ways, so there is always a mask
        assert found.pop("Gemma3DecoderLayer") == (rounded, 3)
        assert found.pop("SiglipEncoderLayer") == (16, 2)
    else:
        assert found.pop("MistralDecoderLayer") == (rounded, 2)
        assert found.pop("PixtralAttentionLayer")[1] == 2
    assert not found


def test_full_finetuning_trains_gates_norms_and_convolutions(tiny, family):
    model = load_model(tiny(family), precision=Precision.FULL, device_map="cpu").train()
    batch = family_batch(tiny(family), model)
    stock = step(model, batch)
    fuse_model(model)
    ours = step(model, batch)
    torch.testing.assert_close(ours[0], stock[0])
    assert set(ours[1]) == set(stock[1])
    for name, expected in stock[1].items():
        assert (ours[1][name] - expected).norm() <= 1e-5 * expected.norm() + 5e-8, (
            name
        )  # a gate's is one sum over all that cancels


def test_eager_attention_equals_stock_and_gives_its_weights(model, batch):
    task_model(model).set_attn_implementation("eager")
    stock = step(model, batch)
    weights = model(**batch, output_attentions=True).attentions
    fuse_model(model)
    assert_same_step(step(model, batch), stock)
    for ours, expected in zip(model(**batch, output_attentions=True).attentions, weights, strict=True):
        torch.testing.assert_close(ours, expected)


def test_text_attention_gets_the_arguments_that_stock_gives_it(model, batch, monkeypatch):
    """Flash attention reads the sliding window among them, which SDPA has in its mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def spy(module, query, key, value, mask, **kwargs):
        if "Vision" not in type(module).__name__ and hasattr(module, "layer_idx"):
            plain = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
            seen.append((type(module).__name__, set(kwargs), plain))
        return attend(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    config = task_model(model).config.get_text_config()
    if config.model_type == "mistral":
        config.sliding_window = 7
    model(**batch)
    stock = list(seen)
    fuse_model(model)
    seen.clear()
    model(**batch)
    assert len(seen) == config.num_hidden_layers
    assert seen == stock


@pytest.mark.parametrize("family", ["pixtral", "mistral3", "gemma3"])
def test_the_places_and_sizes_of_images_may_be_given(family, model, batch):
    """They stand in the place of what stock asks the device for; numbers that do not fit are an error, not a guess."""
    stock = step(model, batch)
    fuse_model(model)
    rows = (batch["input_ids"] == model.config.image_token_id).flatten().nonzero().squeeze(1)
    sizes = {"media_sizes": batch["image_sizes"].tolist()} if "image_sizes" in batch else {}
    assert_same_step(step(model, {**batch, "media_rows": rows, **sizes}), stock)
    assert step(model, {**batch, "media_rows": rows.flip(0), **sizes})[0] != stock[0]
    with pytest.raises((IndexError, RuntimeError)):
        model(**batch, media_rows=rows[1:], **sizes)
    model.eval()
    torch.testing.assert_close(model(**batch, media_rows=rows, **sizes).loss, stock[0])
