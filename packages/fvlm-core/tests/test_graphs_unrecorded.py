"""``"auto"`` checkpointing where layers cannot be recorded: they keep what they compute, by the budget."""

import gc
import logging

import pytest
import torch
from fused_tools import adapted_model, assert_equal_step, make_batch, recorded, step, without_mask

from fvlm_core import ConfigError, Precision, load_model
from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.fused import fuse_model
from fvlm_core.graphs import LayerGraphs


def eight_bit(folder, device="cpu"):
    return adapted_model(folder, Precision.INT8, device=device)


def whole(folder, device="cpu"):
    options = {"dtype": torch.float32, "device_map": device, "fused_layers": False}
    return load_model(folder, precision=Precision.FULL, **options).train()


def dora(folder):
    return adapted_model(folder, use_dora=True)


def dropping(folder):
    return adapted_model(folder, lora_dropout=0.5)


KINDS = [eight_bit, whole, dora, dropping]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def fused(request, tiny):
    model = request.param(tiny("qwen2_vl"))
    fuse_model(model)
    return model


@pytest.fixture
def batch(model):
    return without_mask(make_batch(model.config, (24, 24)))


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    """Each layer counts for one MiB where there is no GPU to ask, the first one too."""
    monkeypatch.setattr("fvlm_core.graphs.room._FIRST_GUESS", 1 << 20)


def seeded(model, batch):
    torch.manual_seed(3)
    return step(model, batch)


def runs_of(model):
    """How often layers run from now on: once in a step where they keep what they compute, else twice."""
    counts = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [*base.model.visual.blocks, *base.model.language_model.layers]
    for number, layer in enumerate(layers):
        inside = layer.mlp
        own = inside.forward

        def counting(*args, number=number, own=own, **kwargs):
            counts[number] = counts.get(number, 0) + 1
            return own(*args, **kwargs)

        vars(inside)["forward"] = counting
    return counts


@pytest.mark.parametrize(("budget", "kept"), [(None, 4), (3.4 / 1024, 2), (1 / 2**30, 0)])
def test_as_many_layers_keep_what_they_compute_as_fit_the_budget(model, batch, caplog, budget, kept):
    caplog.set_level(logging.INFO, logger="fvlm_core")
    expected = seeded(model, batch)
    graphs = recorded(model, "auto", memory_budget=budget)
    counts = runs_of(model)
    for _ in range(3):
        counts.clear()
        assert_equal_step(seeded(model, batch), expected)
        assert sorted(counts.values()) == [1] * kept + [2] * (4 - kept)
    assert graphs.recorded == 0
    said = [r.message for r in caplog.records if "without recordings" in r.message or "not recorded" in r.message]
    assert len(said) == len(set(said)) <= 4
    assert any("keeps what it computes while there is room" in one for one in said) == (kept > 0)
    assert any("No room for more than" in one for one in said) == (kept < 4)


def test_room_is_left_for_gradients_that_a_layer_is_yet_to_get(tiny):
    """They come while the layers before it still keep what they computed; once they are there, no room is needed."""
    model = whole(tiny("qwen2_vl"))
    fuse_model(model)
    batch = without_mask(make_batch(model.config, (24, 24)))
    recorded(model, "auto", memory_budget=4.5 / 1024)  # room for just the fourth
    counts = runs_of(model)
    for runs in ({0: 1, 1: 1, 2: 1, 3: 2}, {0: 1, 1: 1, 2: 1, 3: 1}):
        counts.clear()
        model(**batch).loss.backward()
        assert counts == runs


def test_nothing_stays_held_after_a_step_nor_after_a_pass_that_is_given_up(model, batch):
    graphs = recorded(model, "auto")
    held = graphs.unrecorded._held
    loss = model(**batch).loss
    assert sorted(len(sizes) for sizes in held.values()) == [2, 2]
    loss.backward()
    assert not any(held.values())
    loss = model(**batch).loss
    del loss
    gc.collect()
    assert not any(held.values())


def test_memory_that_runs_out_in_a_layer_lets_it_compute_again(model, batch, monkeypatch):
    expected = seeded(model, batch)
    graphs = recorded(model, "auto")
    counts = runs_of(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mlp = base.model.language_model.layers[0].mlp
    own, state = mlp.forward, {"left": 1}

    def short(*args, **kwargs):
        out = own(*args, **kwargs)
        if state["left"]:
            state["left"] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    monkeypatch.setitem(vars(mlp), "forward", short)
    assert_equal_step(seeded(model, batch), expected)
    assert counts == {0: 1, 1: 1, 2: 3, 3: 2}
    counts.clear()
    assert_equal_step(seeded(model, batch), expected)
    assert counts == {0: 1, 1: 1, 2: 2, 3: 2}  # what was held when memory ran out is the most from then on
    assert not graphs.give_back()
    assert graphs.keep_less()
    counts.clear()
    assert_equal_step(seeded(model, batch), expected)
    assert counts == {0: 1, 1: 2, 2: 2, 3: 2}


def test_a_layer_that_can_be_recorded_again_is(tiny):
    model = dropping(tiny("qwen2_vl"))
    fuse_model(model)
    batch = without_mask(make_batch(model.config, (24, 24)))
    graphs = recorded(model, "auto")
    for _ in range(2):
        step(model, batch)
    assert graphs.recorded == 0
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Identity()
    for _ in range(2):
        step(model, batch)
    assert (graphs.recorded, graphs.replayed) == (4, 8)


@pytest.mark.parametrize("mode", [False, True, "unsloth"])
def test_a_budget_that_a_mode_does_not_ask_for_is_refused(tiny, mode):
    model = adapted_model(tiny("qwen2_vl"))
    use_graphs(model, LayerGraphs(rehearse=True, memory_budget=2))
    with pytest.raises(ConfigError, match=rf"memory_budget=2 is for what layers keep, and under .*{mode!r} nothing"):
        apply_checkpointing(model, mode)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [eight_bit, whole], ids=lambda kind: kind.__name__)
def test_on_a_gpu_the_budget_bounds_what_is_allocated(tiny, kind):
    """There is room for one of two text layers, some 80 MiB, and for less than the other asks for."""
    pytest.importorskip("bitsandbytes")
    model = kind(tiny("qwen2_vl"), "cuda")
    fuse_model(model)
    batch = {name: value.cuda() for name, value in without_mask(make_batch(model.config, (4096, 4096))).items()}
    expected = step(model, batch)
    model.zero_grad()
    torch.cuda.synchronize()
    allocated, room, during = torch.cuda.memory_allocated(), 2 << 30, []
    for _ in range(2):
        graphs = recorded(model, "auto", memory_budget=(allocated + room) / 2**30)
        step(model, batch)
        model.zero_grad()
        loss = model(**batch).loss
        during.append(sum(map(sum, graphs.unrecorded._held.values())))
        largest = max(graphs.unrecorded._sizes.values())
        loss.backward()
        model.zero_grad()
        torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-4, atol=0)
        room = 2.2 * largest
    assert 0.9 * largest < during[1] < 1.5 * largest < during[0]
