"""Checkpointed layers that keep what attention gave, and leave out what nobody reads: the same loss and gradients."""

import weakref

import pytest
import torch
from family_tools import TRAINED, family_batch
from fused_tools import (
    QWEN,
    adapted_model,
    assert_same_step,
    kept,
    make_batch,
    recorded,
    step,
    without_mask,
)

from fvlm_core import Precision, attention, passes
from fvlm_core.checkpointing import apply_checkpointing
from fvlm_core.fused import fuse_model
from fvlm_core.graphs.tape import PlainRecorder
from fvlm_core.offload import _fetch_next, _OnHost
from fvlm_core.passes import LayerPass, add_last, running


def batches(model, device="cpu"):
    made = [make_batch(model.config, lengths, seed) for seed, lengths in enumerate([(24, 20), (30, 30)])]
    return [{name: value.to(device) for name, value in without_mask(batch).items()} for batch in made]


class Counter:
    """Counts the calls of a function that it passes on."""

    def __init__(self, function):
        self.function, self.calls, self.keywords = function, 0, []

    def __call__(self, *args, **kwargs):
        self.calls += 1
        self.keywords.append(kwargs)
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("precision", [Precision.HALF, Precision.NF4], ids=str)
@pytest.mark.parametrize("family", QWEN)
def test_the_same_step_with_kept_attention(tiny, family, precision, monkeypatch):
    model = adapted_model(tiny(family), precision)
    fuse_model(model)
    wanted = batches(model)
    expected = [step(model, batch) for batch in wanted]
    graphs = recorded(model, "offload", keep_attention_from=1)
    for _ in range(2):  # a shape is recorded when it comes for the second time
        for batch, stock in zip(wanted, expected, strict=True):
            assert_same_step(step(model, batch), stock)
    first, again = Counter(passes.attention_with_residuals), Counter(passes.attention_from_residuals)
    plain = Counter(attention.scaled_dot_product_attention)
    monkeypatch.setattr(passes, "attention_with_residuals", first)
    monkeypatch.setattr(passes, "attention_from_residuals", again)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", plain)
    for batch, stock in zip(wanted, expected, strict=True):
        assert_same_step(step(model, batch), stock)
    assert graphs.replayed > 0
    assert first.calls == again.calls > 0
    assert plain.calls == 0  # nowhere in the vision tower is attention computed twice


@pytest.mark.parametrize("mode", [True, "auto"])
def test_layers_that_keep_on_the_device_do_not_keep_attention_apart(tiny, mode, monkeypatch):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    batch = batches(model)[0]
    expected = step(model, batch)
    first = Counter(passes.attention_with_residuals)
    monkeypatch.setattr(passes, "attention_with_residuals", first)
    recorded(model, mode, keep_attention_from=1)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)
    assert first.calls == 0 or mode == "auto"  # "auto" measures a layer's first run before it knows that there is room


def test_a_layer_that_memory_does_not_suffice_to_keep_keeps_its_attention(tiny, monkeypatch):
    """The first one says that there is no room, and is recorded as those behind it are."""
    record = PlainRecorder.record

    def short(recorder, work):
        if work.__name__ == "work_backward_kept":
            raise torch.OutOfMemoryError("said by the test")
        return record(recorder, work)

    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    batch = batches(model)[0]
    expected = step(model, batch)
    monkeypatch.setattr(PlainRecorder, "record", short)
    graphs = recorded(model, "auto", keep_attention_from=1)
    for _ in range(2):
        assert_same_step(step(model, batch), expected)
    assert kept(graphs) == (0, 4)
    plain = Counter(attention.scaled_dot_product_attention)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", plain)
    assert_same_step(step(model, batch), expected)
    assert plain.calls == 0


def test_short_attention_is_computed_again(tiny, monkeypatch):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    first = Counter(passes.attention_with_residuals)
    monkeypatch.setattr(passes, "attention_with_residuals", first)
    recorded(model, "offload")
    for _ in range(3):
        step(model, batches(model)[0])
    assert first.calls == 0


def test_a_frozen_tower_keeps_nothing(tiny, monkeypatch):
    model = adapted_model(tiny("qwen2_vl"), targets=("language",))
    fuse_model(model)
    first = Counter(passes.attention_with_residuals)
    monkeypatch.setattr(passes, "attention_with_residuals", first)
    graphs = recorded(model, "offload", keep_attention_from=1)
    for _ in range(3):
        step(model, batches(model)[0])
    assert graphs.replayed > 0
    assert first.calls == 0


@pytest.mark.parametrize("family", ["gemma3", "pixtral", "mllama"])
def test_towers_of_other_families(tiny, family):
    model = adapted_model(tiny(family), targets=TRAINED)
    fuse_model(model)
    batch = family_batch(tiny(family), model)
    expected = step(model, batch)
    recorded(model, "offload", keep_attention_from=1)
    for _ in range(3):
        assert_same_step(step(model, batch), expected)


def test_two_micro_batches_before_their_backward_passes(tiny):
    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    one, two = batches(model)
    two = {**two, **{name: one[name] for name in two if one[name].shape == two[name].shape and "pixel" not in name}}
    apart = [step(model, batch) for batch in (one, two)]
    recorded(model, "offload", keep_attention_from=1)
    for _ in range(2):
        step(model, one), step(model, two)
    model.zero_grad()
    losses = [model(**batch).loss for batch in (one, two)]  # the second run overwrites what the first one left
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = apart[0][1][name] + apart[1][1][name]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_last_product_is_left_out_in_the_second_run(tiny, monkeypatch):
    from fvlm_core.fused import mlp

    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    counter = Counter(mlp.lora_mlp)
    monkeypatch.setattr(mlp, "lora_mlp", counter)
    recorded(model, True)
    for _ in range(3):
        step(model, batches(model)[0])
    counter.keywords.clear()
    step(model, batches(model)[0])
    unread = [keywords["unread"] for keywords in counter.keywords]
    assert unread.count(True) == unread.count(False) > 0


def test_a_sum_is_computed_in_the_first_run_and_its_gradients_in_the_second():
    x = torch.randn(3, 4, requires_grad=True)
    with running(LayerPass(False)):
        assert torch.equal(add_last(x, torch.square, x), x + x * x)
    with running(LayerPass(True)):
        out = add_last(x, torch.square, x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(x))
    torch.testing.assert_close(grad, 1 + 2 * x)


@pytest.mark.gpu
def test_the_same_step_on_a_gpu_with_attention_on_the_host(tiny):
    model = adapted_model(tiny("qwen2_vl"), Precision.NF4, dtype=torch.bfloat16, device="cuda")
    fuse_model(model)
    wanted = batches(model, "cuda")
    apply_checkpointing(model, True)
    with torch.autocast("cuda", torch.bfloat16):
        expected = [step(model, batch) for batch in wanted]
        recorded(model, "offload", keep_attention_from=1)
        for _ in range(4):
            for batch, stock in zip(wanted, expected, strict=True):
                assert_same_step(step(model, batch), stock, tolerance=3e-2)


def test_each_tensor_that_is_had_calls_for_one_of_the_layer_before():
    class Fake(_OnHost):
        def fetch(self):
            self.back = torch.zeros(1)

    chain = []
    for _ in range(6):  # two layers of three tensors
        before = weakref.ref(chain[-1]) if chain else None
        chain.append(Fake(torch.zeros(1), torch.device("cpu"), None, before))
    fetched = []
    for number in (3, 4, 5):  # autograd unpacks a layer's tensors in the order in which it packed them
        chain[number].back, chain[number].used = None, True
        _fetch_next(chain[number])
        fetched.append([i for i, one in enumerate(chain) if one.back is not None])
    assert fetched == [[2], [1, 2], [0, 1, 2]]
