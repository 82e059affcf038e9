"""A user's ``torch.compile`` around a fused model: Dynamo breaks the graph where it must, and the values stay."""

import torch
from fused_tools import adapted_model, assert_same_step, gradients, make_batch, step, without_mask

from fvlm_core.fused import fuse_model


def test_the_same_step_and_logits(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    batch = without_mask(make_batch(model.config, (24, 24)))
    expected = step(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    assert_same_step((loss.detach(), gradients(model)), expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
