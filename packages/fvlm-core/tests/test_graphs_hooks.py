"""Recorded layers and hooks on them: a replay would not call them, so what they act on is run as it is."""

import pytest
import torch
from fused_tools import adapted_model, assert_equal_step, assert_same_step, make_batch, recorded, step, without_mask

from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.fused import fuse_model, unfuse_model


def test_hooks_on_a_layer_are_called(model):
    batch = without_mask(make_batch(model.config))
    graphs = recorded(model)
    seen = []
    model.base_model.model.model.language_model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        step(model, batch)
    assert len(seen) >= 3  # every time
    assert graphs.recorded == 3  # the other layers


def test_a_layer_is_not_replayed_while_a_later_hook_is_on_it(model):
    batch = without_mask(make_batch(model.config))
    graphs = recorded(model)
    before = [step(model, batch) for _ in range(3)][-1]
    mlp = model.base_model.model.model.language_model.layers[0].mlp
    handle, replayed = mlp.register_forward_hook(lambda module, args, output: output * 0.5), graphs.replayed
    assert not torch.equal(step(model, batch)[0], before[0])
    assert graphs.replayed == replayed + graphs.recorded - 1
    handle.remove()
    assert_equal_step(step(model, batch), before)
    assert graphs.replayed == replayed + 2 * graphs.recorded - 1


@pytest.mark.parametrize("mode", [True, "auto"])
def test_a_hook_on_an_adapters_gradient_acts_once(model, mode):
    """A recording reads the adapter's memory and not the parameter, on which DDP and others hang things."""
    batch = without_mask(make_batch(model.config))
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad and "language" in n)
    expected = step(model, batch)[1][name]
    parameter.register_hook(lambda gradient: gradient * 2)
    graphs = recorded(model, mode)
    for _ in range(3):
        torch.testing.assert_close(step(model, batch)[1][name], 2 * expected, rtol=1e-4, atol=1e-7)
    assert graphs.replayed > graphs.recorded > 0


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("mode", [True, "auto"])
def test_layers_that_are_not_fused_get_gradients_of_the_parameters_that_they_read(model, mode, cast):
    unfuse_model(model)
    batch = without_mask(make_batch(model.config))
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        expected = step(model, batch)
        graphs = recorded(model, mode)
        for _ in range(3):
            assert_same_step(step(model, batch), expected, tolerance=2e-2 if cast else 1e-5)
    assert graphs.replayed > graphs.recorded > 0


@pytest.mark.gpu
def test_nodes_that_others_hold_of_an_adapter_do_not_keep_layers_from_being_recorded(tiny):
    """DDP holds them; they belong to the default stream, which no recording may wait for."""
    model = adapted_model(tiny("qwen2_vl"), device="cuda")
    fuse_model(model)
    held = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters() if p.requires_grad]
    batch = {name: value.cuda() for name, value in without_mask(make_batch(model.config)).items()}
    graphs = recorded(model)
    for _ in range(3):
        step(model, batch)
    assert held
    assert not graphs._off
    assert graphs.replayed > graphs.recorded > 0


def test_hidden_states_asked_for_between_two_steps(model):
    """Transformers collects them by hooks, and leaves those behind."""
    batch = without_mask(make_batch(model.config))
    graphs = recorded(model)
    before = [step(model, batch) for _ in range(3)][-1]
    language = model.base_model.model.model.language_model
    language.config.output_hidden_states = True
    found = model(**batch).hidden_states
    use_graphs(model, None)
    wanted = model(**batch).hidden_states
    language.config.output_hidden_states = False
    assert len(found) == len(wanted) == len(language.layers) + 1
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    use_graphs(model, graphs)
    assert apply_checkpointing(model, True) is True
    made, replayed = graphs.recorded, graphs.replayed
    assert_equal_step(step(model, batch), before)
    assert (graphs.recorded, graphs.replayed) == (made, replayed + made)
    fresh = recorded(model)
    for _ in range(2):
        step(model, batch)
    assert fresh.recorded == made
