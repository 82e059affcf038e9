"""Fused models that have run, copied and stored: what was kept of the layers belongs to the model it was read from."""

import copy

import pytest
import torch
from fused_tools import adapted_model, make_batch, step

from fvlm_core.fused import fuse_model, unfuse_model


@pytest.fixture
def model(tiny):
    return adapted_model(tiny("qwen2_vl"))


@pytest.fixture
def batch(model):
    return make_batch(model.config)


def test_a_copy_of_a_model_that_has_run_follows_its_own_state(model, batch):
    fuse_model(model)
    adapted_loss = step(model, batch)[0]
    other = copy.deepcopy(model)
    with torch.no_grad(), other.disable_adapter():
        ours = other(**batch).loss
        unfuse_model(other)
        torch.testing.assert_close(ours, other(**batch).loss)
    assert not torch.equal(ours, adapted_loss)


def test_a_model_that_has_run_can_be_stored_as_a_whole(model, batch, tmp_path):
    fuse_model(model)
    loss, _ = step(model, batch)
    torch.save(model, tmp_path / "model.pt")
    torch.testing.assert_close(step(torch.load(tmp_path / "model.pt", weights_only=False), batch)[0], loss)
