"""The fused layers of Llama 3.2 Vision, Pixtral, Mistral 3 and Gemma 3 compute what their own layers compute."""

import copy

import pytest
import torch
import transformers
from family_tools import FAMILIES, family_batch, prompt_of, without_padding_mask
from fused_tools import adapted_model, assert_equal_step, assert_same_step, step
from torch import nn

from fvlm_core import Precision, load_model
from fvlm_core.arch import plain_modules, task_model
from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.fused import fuse_model, fusion_report, has_fused_loss, unfuse_model
from fvlm_core.fused.patches import patch_conv_forward, patch_conv_unfit
from fvlm_core.graphs import LayerGraphs

TRAINED = ("vision", "projector", "language")
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


def modules_of(model, kind):
    named = dict(plain_modules(model))
    return [named[name] for name, found in fusion_report(model).fused.items() if found == kind]


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


def recorded(model):
    """Record a fused model's layers from now on, as a rehearsal; return what does it."""
    graphs = LayerGraphs(rehearse=True)
    use_graphs(model, graphs)
    apply_checkpointing(model, True)
    return graphs


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
    assert_only_causal_layers_are_rounded(family, targets, padded, batch["input_ids"].shape[1], graphs)


def assert_only_causal_layers_are_rounded(family, targets, padded, tokens, graphs):
    rounded = tokens if padded else -(-tokens // 64) * 64
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
        assert found.pop("Gemma3DecoderLayer") == (tokens, 3)
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
        assert (ours[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name


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


def test_a_mask_given_by_position_is_recorded(tiny):
    model = adapted_model(tiny("gemma3"))
    fuse_model(model)
    layer = modules_of(model, "tower_block")[0]
    x = torch.randn(2, 16, 64, requires_grad=True)
    masks = [torch.randn(1, 1, 16, 16) for _ in range(3)]
    expected = [layer(x, mask) for mask in masks]
    graphs = recorded(model)
    for mask, wanted in zip(masks, expected, strict=True):
        torch.testing.assert_close(layer(x, mask), wanted)
    assert (graphs.recorded, graphs.replayed) == (1, 2)


@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_a_pixtral_tower_makes_no_mask_and_the_same_states(model, batch, monkeypatch):
    tower = task_model(model).model.vision_tower
    args = {"image_sizes": batch["image_sizes"], "output_hidden_states": True}
    with torch.no_grad():
        stock = tower(batch["pixel_values"], **args)
    fuse_model(model)
    monkeypatch.setattr("transformers.models.pixtral.modeling_pixtral.generate_block_attention_mask", None)
    with torch.no_grad():
        ours = tower(batch["pixel_values"], **args)
        alone = tower(batch["pixel_values"], image_sizes=batch["image_sizes"].tolist())
    assert len(ours.hidden_states) == len(stock.hidden_states) == 3
    for state, expected in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(state, expected)
    torch.testing.assert_close(ours.last_hidden_state, stock.last_hidden_state)
    torch.testing.assert_close(alone.last_hidden_state, stock.last_hidden_state)
    assert alone.hidden_states is None


@pytest.mark.parametrize("family", ["pixtral"])
def test_images_without_sizes_are_not_padded(model, batch):
    tower = task_model(model).model.vision_tower
    with torch.no_grad():
        stock = tower(batch["pixel_values"]).last_hidden_state
        fuse_model(model)
        torch.testing.assert_close(tower(batch["pixel_values"]).last_hidden_state, stock)


@pytest.mark.parametrize("family", ["pixtral"])
@pytest.mark.parametrize("part", ["layer", "attention"])
def test_a_pixtral_layer_with_a_forward_of_its_own_gets_its_mask(model, batch, part):
    """It would not know what the bounds of the images are, and would let them see each other."""
    stock = step(model, batch)
    layer = task_model(model).model.vision_tower.transformer.layers[1]
    module = layer if part == "layer" else layer.attention
    module.forward = module.forward
    assert list(fuse_model(model).left.values()) == ["has a forward of its own"]
    assert_same_step(step(model, batch), stock)


@pytest.mark.parametrize("family", ["mllama"])
def test_an_encoder_with_a_forward_of_its_own_runs_fused_layers(model, batch):
    stock = step(model, batch)
    encoder = task_model(model).model.vision_model.transformer
    encoder.forward = encoder.forward
    assert list(fuse_model(model).left.values()) == ["has a forward of its own"]
    assert_same_step(step(model, batch), stock)


@pytest.mark.parametrize("family", ["mllama"])
def test_the_vision_layers_of_llama_are_checkpointed(model, batch):
    fuse_model(model)
    layers = modules_of(model, "tower_block")
    calls = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    step(model, batch)
    assert len(calls) == len(layers) == 5
    apply_checkpointing(model, True)
    step(model, batch)
    assert len(calls) == (1 + 2) * 5
    model.eval()
    model(**batch)
    assert len(calls) == (1 + 2 + 1) * 5


def test_a_text_model_of_another_kind_keeps_its_own_layers():
    text = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    vision = transformers.PixtralVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, image_size=32)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1)
    )
    report = fuse_model(model)
    assert {"task_model", "packed_tower", "plain_mlp"} <= set(report.fused.values())
    assert not any(name.startswith("model.language_model") for name in report.fused)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, None), ({"padding": 1}, "patches"), ({"stride": 1}, "patches"), ({"groups": 2}, "convolution")],
    ids=str,
)
def test_a_convolution_is_a_matrix_product_only_if_its_patches_lie_apart(options, reason):
    convolution = nn.Conv2d(4, 8, 2, **{"stride": 2, **options})
    found = patch_conv_unfit(convolution)
    if reason is not None:
        assert reason in found
        return
    assert found is None
    x = torch.randn(3, 4, 7, 6)  # a row and nothing of a column is left over
    torch.testing.assert_close(patch_conv_forward(convolution, x), convolution(x))
