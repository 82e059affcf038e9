"""A user's ``torch.compile`` around a fused model: Dynamo breaks the graph where it must, and the values stay."""

import pytest
import torch
from family_tools import FAMILIES, family_batch
from fused_tools import QWEN, adapted_model, assert_same_step, gradients, make_batch, step

from fvlm_core import Precision, load_model
from fvlm_core.fused import fuse_model, unfuse_model


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    yield
    torch._dynamo.reset()


def compiled_step(model, compiled, batch):
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("family", [*QWEN[1:], *FAMILIES])
def test_the_same_step(tiny, family):
    """What Dynamo makes of it is run as it stands: a compiler behind it takes minutes and sees nothing of FVLM."""
    model = load_model(tiny(family), precision=Precision.FULL, dtype=torch.float32, device_map="cpu").train()
    batch = make_batch(model.config) if family in QWEN else family_batch(tiny(family), model)
    expected = step(model, batch)
    fuse_model(model)
    loss, found = compiled_step(model, torch.compile(model, backend="eager"), batch)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    assert set(found) == set(expected[1])
    for name, gradient in expected[1].items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 5e-8, name  # a gate's cancels


def test_the_same_step_and_logits_and_after_undo(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    batch = make_batch(model.config, (24, 24))
    expected = step(model, batch)
    fuse_model(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_step(compiled_step(model, compiled, batch), expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    model.train()
    unfuse_model(model)
    assert_same_step(compiled_step(model, compiled, batch), expected)  # not what was compiled of fused layers
