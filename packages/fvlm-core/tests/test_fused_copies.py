"""Fused models copied and stored as a whole run fused, and follow their own state."""

import copy
import dataclasses
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fused_tools import adapted_model, assert_equal_step, make_batch, recorded, step, without_mask

from fvlm_core.checkpointing import checkpointing_mode, graphs_of
from fvlm_core.decoding import decoding_report, enable_decoding
from fvlm_core.fused import fuse_model, fusion_report, unfuse_model
from fvlm_core.fused.engine import LAYERS


@pytest.fixture
def model(tiny):
    return adapted_model(tiny("qwen2_vl"))


@pytest.fixture
def batch(model):
    return without_mask(make_batch(model.config, (24, 24)))


def counted(monkeypatch):
    """How often fused forwards of each kind run from now on."""
    calls = Counter()

    def counting(kind, forward):
        def run(*args, **kwargs):
            calls[kind] += 1
            return forward(*args, **kwargs)

        return run

    for kind, layer in list(LAYERS.items()):
        monkeypatch.setitem(LAYERS, kind, dataclasses.replace(layer, forward=counting(kind, layer.forward)))
    return calls


def stored(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def copied(model, folder):
    return copy.deepcopy(model)


def test_a_copy_of_a_model_that_has_run_follows_its_own_state(model, batch):
    fuse_model(model)
    adapted_loss = step(model, batch)[0]
    other = copy.deepcopy(model)
    with torch.no_grad(), other.disable_adapter():
        ours = other(**batch).loss
        unfuse_model(other)
        torch.testing.assert_close(ours, other(**batch).loss)
    assert not torch.equal(ours, adapted_loss)


@pytest.mark.parametrize("make", [stored, copied])
def test_it_runs_the_fused_layers_and_can_be_unfused_and_fused_again(model, batch, tmp_path, monkeypatch, make):
    report = fuse_model(model)
    calls = counted(monkeypatch)
    expected = step(model, batch)
    wanted = dict(calls)
    assert {kind for kind in report.fused.values() if calls[kind] == 0} == set()
    other = make(model, tmp_path)
    calls.clear()
    assert_equal_step(step(other, batch), expected)
    assert dict(calls) == wanted
    assert fusion_report(other) == report == fuse_model(other)
    calls.clear()
    unfuse_model(other)
    step(other, batch)
    assert not calls
    assert not [name for name, module in other.named_modules() if "forward" in vars(module)]
    assert fuse_model(other) == report
    assert_equal_step(step(other, batch), expected)
    assert dict(calls) == wanted
    assert model.base_model.model.forward.args[0] is model.base_model.model  # and the first one is as it was


@pytest.mark.parametrize("make", [stored, copied])
def test_its_layers_show_the_signatures_that_they_replace(model, tmp_path, make):
    names = fuse_model(model).fused
    other = make(model, tmp_path)
    unfused = adapted_like(other)
    for name in names:
        ours = inspect.signature(other.get_base_model().get_submodule(name).forward)
        assert ours == inspect.signature(unfused.get_submodule(name).forward)


def adapted_like(model):
    base = copy.deepcopy(model.get_base_model())
    unfuse_model(base)
    return base


@pytest.mark.parametrize("make", [stored, copied])
def test_its_checkpointing_and_recordings_stand(model, batch, tmp_path, make):
    fuse_model(model)
    graphs = recorded(model, "auto")
    expected = [step(model, batch) for _ in range(2)]
    other = make(model, tmp_path)
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # as a Trainer may
    assert checkpointing_mode(other) == "auto"
    assert graphs_of(other) is not graphs
    for wanted in expected:
        assert_equal_step(step(other, batch), wanted)
    assert graphs_of(other).recorded == graphs.recorded == 4


@pytest.mark.parametrize("make", [stored, copied])
def test_its_decoding_is_recorded(tiny, batch, tmp_path, make):
    model = adapted_model(tiny("qwen2_vl"), targets=("language",)).eval()
    fuse_model(model)
    assert enable_decoding(model, rehearse=True) is None
    prompt = {"input_ids": batch["input_ids"][:, 10:], "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**prompt)
    other = make(model, tmp_path)
    assert torch.equal(other.generate(**prompt), expected)
    assert (decoding_report(other).recorded, dict(decoding_report(other).left)) == (1, {})


ELSEWHERE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from fused_tools import step
model, batch = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
torch.save(step(model, batch), sys.argv[1] + "/step.pt")
"""


@pytest.mark.parametrize("fused", [False, True])
def test_a_stored_model_runs_in_another_process(model, batch, tmp_path, fused):
    """One that has loaded no model itself: the name of its tower's attention comes along."""
    if fused:
        fuse_model(model)
    expected = step(model, batch)
    torch.save((model, batch), tmp_path / "model.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_equal_step(torch.load(tmp_path / "step.pt"), expected)
