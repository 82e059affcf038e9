"""Fused vision towers: Pixtral's without its mask, Llama's under checkpointing, and what falls back to stock."""

import copy

import pytest
import torch
import transformers
from family_tools import TRAINED, family_batch, modules_of, recorded
from fused_tools import adapted_model, assert_same_step, step
from torch import nn

from fvlm_core.arch import task_model
from fvlm_core.checkpointing import apply_checkpointing
from fvlm_core.fused import fuse_model
from fvlm_core.fused.patches import patch_conv_forward, patch_conv_unfit


@pytest.fixture(scope="module")
def adapted_towers(tiny):
    return {family: adapted_model(tiny(family), targets=TRAINED) for family in ("pixtral", "mistral3", "mllama")}


@pytest.fixture
def model(adapted_towers, family):
    """A copy, unfused."""
    return copy.deepcopy(adapted_towers[family])


@pytest.fixture
def batch(tiny, family, model):
    return family_batch(tiny(family), model)


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
