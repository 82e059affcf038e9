"""How much recorded layers keep of what they compute under ``use_gradient_checkpointing="auto"``."""

import pytest
import torch
from fused_tools import adapted_model, assert_same_step, kept, make_batch, recorded, step, without_mask

from fvlm_core import ConfigError, Precision, load_model
from fvlm_core.fused import fuse_model
from fvlm_core.graphs import LayerGraphs
from fvlm_core.graphs.room import Room


@pytest.mark.parametrize(("budget", "layers"), [(2.5 / 1024, 2), (1 / 2**30, 0), (None, 4)])
def test_what_is_kept_stays_within_the_budget(model, monkeypatch, budget, layers):
    """Each layer counts for one MiB where there is no GPU to ask."""
    monkeypatch.setattr("fvlm_core.graphs.room._FIRST_GUESS", 1 << 20)
    batch = without_mask(make_batch(model.config))
    expected = step(model, batch)
    graphs = recorded(model, "auto", memory_budget=budget)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert kept(graphs) == (layers, 4)


def test_a_budget_that_nothing_can_use_is_refused(tiny):
    for options in ({"device_map": "cpu"}, {"device_map": "cpu", "fused_layers": True}):
        with pytest.raises(ConfigError, match=r"memory_budget=2 has nothing to plan"):
            load_model(tiny("qwen2_vl"), memory_budget=2, **options)


def test_a_budget_must_be_an_amount():
    with pytest.raises(ConfigError, match=r"memory_budget=0 is no amount of memory: pass GiB above 0"):
        LayerGraphs(memory_budget=0)


@pytest.mark.parametrize(
    ("fraction", "budget", "left"), [(0.5, None, 24), (1.0, None, 39), (0.5, 25, 5), (0.5, 90, 30)]
)
def test_room_on_a_gpu(monkeypatch, fraction, budget, left):
    """Of 100 GiB others have 30 and 40 are free; this process reserved 30, of which it uses 20."""
    asked, gib = [], 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (40 * gib, 100 * gib))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * gib)
    device = torch.device("cuda", 0)
    assert Room(budget).left(device) == left * gib
    assert asked == [device]  # it takes the driver's time, in every call of a layer that is not recorded
    assert Room(budget).free(device) == (30 if fraction == 0.5 else 50) * gib


@pytest.mark.gpu
def test_keeping_takes_memory_and_spares_the_second_forward_pass(tiny):
    model = adapted_model(tiny("qwen2_vl"), Precision.NF4, dtype=torch.bfloat16, device="cuda")
    fuse_model(model)
    batch = {name: value.cuda() for name, value in without_mask(make_batch(model.config, (512, 512))).items()}
    held, results = {}, {}
    for mode in (True, "auto"):
        options = {}
        if mode == "auto":  # whatever else runs on the device
            options["memory_budget"] = torch.cuda.memory_allocated() / 2**30 + 2
        graphs = recorded(model, mode, **options)
        for _ in range(3):
            results[mode] = step(model, batch)
        model.zero_grad()
        held[mode] = torch.cuda.memory_allocated()
        assert kept(graphs) == (4 if mode == "auto" else 0, 4)
    assert held["auto"] > held[True]
    assert_same_step(results["auto"], results[True], tolerance=1e-6)
