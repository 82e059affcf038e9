"""Recordings of layers in which more is trained than adapters: norms, biases, copies that PEFT saves whole."""

import pytest
import torch
from fused_tools import adapted_model, assert_same_step, make_batch, recorded, step, without_mask

from fvlm_core.checkpointing import use_graphs
from fvlm_core.fused import fuse_model


def norms_too(model):
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)


KINDS = {
    "norms": ({}, norms_too),
    "biases": ({"bias": "all"}, None),
    "biases of adapted layers": ({"bias": "lora_only"}, None),
    "saved whole": ({"modules_to_save": ["input_layernorm", "norm1", "lm_head"]}, None),
    "rslora": ({"use_rslora": True}, None),
}
"""What of the layers is trained → options of the adapter, and what is done to the model."""


@pytest.fixture(params=KINDS)
def trained(request, tiny):
    options, prepare = KINDS[request.param]
    model = adapted_model(tiny("qwen2_vl"), **options)
    if prepare is not None:
        prepare(model)
    fuse_model(model)
    return model


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("mode", [True, "auto"])
def test_all_get_the_gradients_that_they_get_unrecorded(trained, mode, cast):
    batches = [without_mask(make_batch(trained.config, (24, 24), seed)) for seed in (1, 2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        expected = [step(trained, batch) for batch in batches]
        graphs = recorded(trained, mode)
        for _ in range(3):
            for batch, wanted in zip(batches, expected, strict=True):
                assert_same_step(step(trained, batch), wanted, tolerance=4e-2 if cast else 1e-5)
    assert graphs.replayed > graphs.recorded == 4


def test_what_is_trained_is_where_it_was(trained):
    """Leaves stand in for parameters while a layer is recorded, and are gone afterwards, also after an error."""
    batch = without_mask(make_batch(trained.config, (24, 24)))
    before = dict(trained.named_parameters())
    recorded(trained)
    for _ in range(2):
        step(trained, batch)
    after = dict(trained.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    mlp = trained.base_model.model.model.language_model.layers[1].mlp

    def fail(*_, **__):
        raise ValueError("of the layer's own")

    recorded(trained)
    step(trained, batch)
    vars(mlp)["forward"] = fail
    with pytest.raises(ValueError, match="of the layer's own"):
        step(trained, batch)
    assert all(one is before[name] for name, one in trained.named_parameters())


def test_values_that_change_are_read(trained):
    batch = without_mask(make_batch(trained.config, (24, 24)))
    recorded(trained)
    for _ in range(2):
        step(trained, batch)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    ours = step(trained, batch)
    use_graphs(trained, None)
    assert_same_step(ours, step(trained, batch))


@pytest.mark.parametrize("mode", [True, "auto"])
def test_a_hook_on_a_gradient_acts_once(trained, mode):
    """Were the parameter itself read in the recording, its hook would act there too."""
    batch = without_mask(make_batch(trained.config, (24, 24)))
    hooked = [n for n, p in trained.named_parameters() if p.requires_grad and "lora_" not in n and "layers." in n]
    expected = step(trained, batch)[1]
    for name, parameter in trained.named_parameters():
        if name in hooked:
            parameter.register_hook(lambda gradient: gradient * 2)
    recorded(trained, mode)
    for _ in range(3):
        found = step(trained, batch)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient * (2 if name in hooked else 1), rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
def test_nodes_that_others_hold_do_not_keep_layers_from_being_recorded(tiny):
    """DDP holds them; they belong to the default stream, which no recording may wait for."""
    model = adapted_model(tiny("qwen2_vl"), device="cuda", bias="all")
    norms_too(model)
    fuse_model(model)
    held = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters() if p.requires_grad]
    batch = {name: value.cuda() for name, value in without_mask(make_batch(model.config)).items()}
    expected = step(model, batch)
    graphs = recorded(model)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert held
    assert not graphs._off
    assert graphs.replayed > graphs.recorded == 4
