"""What changes in a model between two steps so that its recordings no longer serve, and how often they are made."""

import copy
import gc
import weakref

import pytest
import torch
from fused_tools import (
    adapted_model,
    assert_equal_step,
    assert_same_step,
    kept,
    make_batch,
    recorded,
    step,
    without_mask,
)
from peft import LoraConfig, get_peft_model
from torch import nn

from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.fused import fuse_model
from fvlm_core.graphs.stage import Arena, Stage


def layers_of(model):
    return model.base_model.model.model.language_model.layers


@pytest.fixture
def batch(model):
    return without_mask(make_batch(model.config, (24, 24)))


def new_parameter(layer):
    layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.data * 2, requires_grad=False)


def new_norm(layer):
    layer.input_layernorm = copy.deepcopy(layer.input_layernorm)


def new_mlp(layer):
    layer.mlp = copy.deepcopy(layer.mlp)


def new_base(layer):
    layer.mlp.up_proj.base_layer = copy.deepcopy(layer.mlp.up_proj.base_layer)


@pytest.mark.parametrize("change", [new_parameter, new_norm, new_mlp, new_base], ids=lambda change: change.__name__)
def test_a_layer_in_which_something_was_replaced_is_recorded_anew(model, batch, change):
    """Without a GPU a stale recording gives the right values, for it runs the layer's code; so they are counted."""
    graphs = recorded(model)
    for _ in range(3):
        step(model, batch)
    assert graphs.recorded == 4
    change(layers_of(model)[1])
    ours = step(model, batch)
    assert graphs.recorded == 5
    for _ in range(2):
        assert_equal_step(step(model, batch), ours)
    assert graphs.recorded == 5
    use_graphs(model, None)
    assert_same_step(ours, step(model, batch))


def test_an_adapter_behind_one_that_was_unloaded_is_trained(model, batch):
    """The recordings are of the first one, which goes on existing where they hold it."""
    graphs = recorded(model)
    for _ in range(3):
        step(model, batch)
    model = get_peft_model(model.unload(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).train()
    for _ in range(3):
        ours = step(model, batch)
    assert graphs.recorded > 4
    use_graphs(model, None)
    expected = step(model, batch)
    assert len(ours[1]) == 8
    torch.testing.assert_close(ours, expected)
    assert all(ours[1][name].any() for name in ours[1] if "lora_B" in name)


@pytest.mark.parametrize("mode", [True, "auto"])
def test_layers_that_drop_attention_weights_draw_the_same_ones_in_both_passes(model, batch, mode):
    """A recording would draw others where it computes again."""
    dropping = [module for module in model.modules() if "attention_dropout" in vars(module)]
    for module in dropping:
        module.attention_dropout = 0.5

    def seeded():
        torch.manual_seed(3)
        return step(model, batch)

    expected = seeded()
    graphs = recorded(model, mode)
    for _ in range(3):
        assert_equal_step(seeded(), expected)
    assert dropping
    assert graphs.recorded == 0
    for module in dropping:
        module.attention_dropout = 0.0
    assert not torch.equal(seeded()[0], expected[0])
    assert graphs.recorded == 4


def test_what_a_layer_keeps_is_counted_once_however_often_it_is_recorded(model, batch, monkeypatch):
    """And no longer once it is dropped."""
    monkeypatch.setattr("fvlm_core.graphs.runner.MOST_STAGES", 4)
    graphs = recorded(model, "auto")
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for _ in range(2):
            step(model, batch)
        assert kept(graphs) == (4, 4)
        assert graphs._room.kept_bytes == 4 << 20
    for length in (100, 200, 300):
        for _ in range(2):
            step(model, without_mask(make_batch(model.config, (length, length))))
        assert graphs._room.kept_bytes == kept(graphs)[0] << 20


def test_another_mode_has_recordings_of_its_own(model, batch):
    graphs = recorded(model, "auto")
    for mode, layers in (("auto", 4), ("offload", 0), ("auto", 4), (True, 0)):
        apply_checkpointing(model, mode)
        for _ in range(3):
            step(model, batch)
        assert kept(graphs)[0] == layers
        assert graphs.holds == (layers > 0)


def test_arguments_that_lie_there_already_are_not_copied_again():
    """A length is made anew for each layer, as an int that is equal and not the same; tensors change in place."""
    starts, cosines = torch.tensor([0, 4]), (torch.ones(4, 2), torch.ones(4, 2))
    kwargs = {"starts": starts, "longest": 1000, "position_embeddings": cosines}
    stage = Stage(torch.zeros(4, 8), kwargs, 4, needs_dx=False, arena=Arena())
    stage.load_arguments((starts, int("1000"), cosines))
    for other, loads in (((starts, int("1000"), cosines), False), ((starts.clone(), 1000, cosines), True)):
        stage.kwargs["starts"].fill_(7)
        stage.load_arguments(other)
        assert torch.equal(stage.kwargs["starts"], starts) == loads
    stage.load_arguments((starts, 1000, cosines))
    stage.load_arguments((starts.fill_(1), 1000, cosines))
    assert torch.equal(stage.kwargs["starts"], starts)


def test_a_batch_that_was_loaded_is_not_held(model, batch):
    """Masks of tokens by tokens are large, and there is a recording for each of many lengths."""
    recorded(model)
    made = []
    rotary = model.base_model.model.model.language_model.rotary_emb
    rotary.register_forward_hook(lambda _, args, out: made.extend(map(weakref.ref, out)))
    for _ in range(3):
        step(model, batch)
    gc.collect()
    assert len(made) == 6
    assert not [one for one in made if one() is not None]


def test_gradients_of_several_dtypes_keep_the_precision_of_each(tiny):
    """They lie in one piece of memory."""
    model = adapted_model(tiny("qwen2_vl"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
        elif "norm" in name:
            parameter.requires_grad_(True)
    fuse_model(model)
    batch = without_mask(make_batch(model.config, (24, 24)))
    with torch.autocast("cpu", torch.bfloat16):
        step(model, batch)
        recorded(model)
        for _ in range(3):
            found = step(model, batch)[1]
    norms = {name: g for name, g in found.items() if "layers.0.input_layernorm" in name}
    assert [g.dtype for g in norms.values()] == [torch.float32]
    assert not any(torch.equal(g, g.bfloat16().float()) for g in norms.values())
