"""FlashAttention-4: that it is asked for only where it is right and pays, and that it computes what PyTorch does."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fvlm_core import attention, flash
from fvlm_core.passes import LayerPass, quick_attention, running


def plain(q, k, v, scale, causal, cu):
    """Attention and the logarithms of its sums for tokens first, in fp32, with autograd."""
    if cu is None:
        lengths, rows = (q.shape[1],), [t.transpose(1, 2).float() for t in (q, k, v)]
    else:
        lengths, rows = cu.diff().tolist(), [t.transpose(0, 1).float() for t in (q, k, v)]
    outs, sums = [], []
    for a, b, c in zip(*(t.split(lengths, dim=-2) for t in rows), strict=True):
        scores = a @ b.transpose(-1, -2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        outs.append(scores.softmax(-1) @ c)
        sums.append(scores.logsumexp(-1))
    out = torch.cat(outs, dim=-2).to(q.dtype)
    return out.transpose(1, 2) if cu is None else out.transpose(0, 1), torch.cat(sums, dim=-1)


def plain_backward(q, k, v, out, dout, lse, scale, causal, cu=None, longest=None):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        made, _ = plain(*leaves, scale, causal, cu)
    return torch.autograd.grad(made, leaves, dout)


def package(backward=plain_backward):
    """What stands for `fvlm_core.flash.kernels` where there is no GPU: the same calls in plain PyTorch."""
    return SimpleNamespace(
        forward=lambda q, k, v, scale, causal, cu=None, longest=None: plain(q, k, v, scale, causal, cu),
        backward=backward,
    )


@pytest.fixture
def few_heads(monkeypatch):
    """The comparison is made for a GPU; two heads say as much about a stand-in."""
    monkeypatch.setattr(flash, "_HEADS", 2)


def unseen_backward(*args, **kwargs):
    """The stand-in's own saved tensors, which kernels do not have, are kept from the hooks around it."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return plain_backward(*args, **kwargs)


def test_the_comparison_leaves_no_trace_in_a_checkpointed_layer(few_heads, monkeypatch):
    """A layer's first pass may be the one that compares: what it saves is counted, its random numbers are repeated."""
    monkeypatch.setattr(flash, "_kernels", lambda: package(unseen_backward))
    saved, before = [], torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        assert flash._agrees(torch.device("cpu"), torch.bfloat16, 80, False, False)
    assert not saved
    assert torch.equal(before, torch.get_rng_state())


def wrong_backward(*args, **kwargs):
    dq, dk, dv = plain_backward(*args, **kwargs)
    return dq * 1.1, dk, dv


def moved_backward(*args, **kwargs):
    raise TypeError("_flash_attn_bwd() got an unexpected keyword argument 'causal'")


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_comparison_lets_right_kernels_pass(few_heads, monkeypatch, causal, segments):
    monkeypatch.setattr(flash, "_kernels", package)
    assert flash._agrees(torch.device("cpu"), torch.bfloat16, 80, causal, segments)


@pytest.mark.parametrize(
    ("backward", "said"), [(wrong_backward, "parts from PyTorch by 1"), (moved_backward, "unexpected keyword")]
)
def test_kernels_that_are_wrong_or_moved_are_left_alone(few_heads, monkeypatch, caplog, backward, said):
    monkeypatch.setattr(flash, "_kernels", lambda: package(backward))
    with caplog.at_level(logging.WARNING):
        assert not flash._agrees(torch.device("cpu"), torch.bfloat16, 80, False, False)
    assert said in caplog.text


def test_a_cpu_is_never_asked():
    q = torch.zeros(1, 16, 4096, 80, dtype=torch.bfloat16)
    assert not flash.takes(q, q, causal=False)


def tensors(*shape, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for _ in range(4)]


def test_known_results_are_taken_and_not_computed_again(monkeypatch):
    monkeypatch.setattr(flash, "takes", lambda q, k, **kwargs: True)
    monkeypatch.setattr(flash, "_kernels", package)
    q, k, v, dout = tensors(2, 4, 12, 16)
    want = scaled_dot_product_attention(q, k, v, scale=0.3)
    wanted = torch.autograd.grad(want, (q, k, v), dout)
    first = LayerPass(again=False, keep_from=1)
    with running(first), torch.no_grad():
        out = quick_attention(q, k, v, causal=False, scale=0.3)
    assert first.kept[0].backend == flash.NAME
    torch.testing.assert_close(out, want)

    def none(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(flash, "_kernels", lambda: SimpleNamespace(forward=none, backward=plain_backward))
    with running(LayerPass(again=True, kept=first.kept, keep_from=1)):
        again = quick_attention(q, k, v, causal=False, scale=0.3)
    assert torch.equal(again, out)
    for got, expected in zip(torch.autograd.grad(again, (q, k, v), dout), wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lengths", [(8, 8, 8), (5, 12, 7)], ids=["one size", "several sizes"])
def test_packed_images_go_through_it_where_it_takes_them(monkeypatch, lengths):
    asked = []
    monkeypatch.setattr(flash, "takes", lambda q, k, **kwargs: asked.append(kwargs) or True)
    monkeypatch.setattr(flash, "_kernels", package)
    monkeypatch.setattr(attention, "runs_flash", lambda q: True)
    q, k, v, dout = tensors(1, 4, sum(lengths), 16)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    pieces = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    want = torch.cat([scaled_dot_product_attention(a, b, c, scale=0.25) for a, b, c in pieces], dim=2)
    out, _ = attention.varlen_attention_forward(
        torch.nn.Identity(), q, k, v, None, 0.25, cu_seq_lens_q=cu, max_length_q=max(lengths)
    )
    torch.testing.assert_close(out.transpose(1, 2), want)
    got = torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))
    for one, expected in zip(got, torch.autograd.grad(want, (q, k, v), dout), strict=True):
        torch.testing.assert_close(one, expected)
    assert asked[0].get("longest") == (max(lengths) if len(set(lengths)) > 1 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [72, 80, 96])
def test_on_a_gpu_batches_equal_float64(width, dtype):
    q, k, v, dout = tensors(2, 3, 2112, width, device="cuda", dtype=dtype)
    assert flash.takes(q, k, causal=False), "install fvlm-core[flash]; a Hopper GPU is needed"
    assert_near_float64(lambda: flash.attention(q, k, v, causal=False, scale=width**-0.5), q, k, v, dout)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 72, 80, 128])
def test_on_a_gpu_segments_equal_float64(width):
    lengths = (900, 0, 64, 1, 2500, 333)
    q, k, v, dout = (t.squeeze(0) for t in tensors(1, sum(lengths), 4, width, device="cuda", dtype=torch.bfloat16))
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    assert flash.takes(q, k, causal=False, longest=2500), "install fvlm-core[flash]; a Hopper GPU is needed"
    out = flash.attention(q, k, v, causal=False, scale=width**-0.5, cu=cu, longest=2500)
    got = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    with torch.enable_grad():
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        made = [
            scaled_dot_product_attention(*(t.transpose(0, 1).unsqueeze(0) for t in piece), scale=width**-0.5)
            for piece in zip(*(t.split(lengths) for t in exact), strict=True)
            if len(piece[0])
        ]
        want = torch.cat(made, dim=2).squeeze(0).transpose(0, 1)
        wanted = [want, *torch.autograd.grad(want, exact, dout.double())]
    for one, expected in zip(got, wanted, strict=True):
        assert distance(one, expected) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("width", [72, 80, 96])
def test_on_a_gpu_many_tiles_in_memory_that_was_used(width):
    """More tiles than run at once, gradients of another layout than the inputs, and rubbish in what is allocated."""
    q, k, v = (t.transpose(1, 2) for t in tensors(4, 5120, 16, width, device="cuda", dtype=torch.bfloat16)[:3])
    dout = torch.randn(4, 16, 5120, width, device="cuda", dtype=torch.bfloat16)
    rubbish = [torch.full((2**28,), 1e4, device="cuda"), torch.full((2**18,), 1e4, device="cuda")]
    del rubbish
    assert flash.takes(q, k, causal=False), "install fvlm-core[flash]; a Hopper GPU is needed"
    out = flash.attention(q, k, v, causal=False, scale=0.1)
    want = scaled_dot_product_attention(q, k, v, scale=0.1)
    pairs = zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(want, (q, k, v), dout), strict=True)
    assert max(distance(one, expected.double()) for one, expected in pairs) < 1e-2


@pytest.mark.gpu
def test_on_a_gpu_it_runs_in_a_recording_and_not_where_runs_must_repeat():
    q, k, v, dout = tensors(1, 2, 2048, 80, device="cuda", dtype=torch.bfloat16)
    assert flash.takes(q, k, causal=False), "install fvlm-core[flash]; a Hopper GPU is needed"

    def both():
        out = flash.attention(q, k, v, causal=False, scale=0.1)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    with torch.no_grad():  # what the recording computes, not what making it left
        for t in (q, k, v, dout):
            t.copy_(torch.randn_like(t))
    want = both()
    graph.replay()
    assert torch.equal(got[0], want[0])
    for one, expected in zip(got, want, strict=True):
        assert distance(one, expected.double()) < 1e-3  # dQ is summed in any order
    torch.use_deterministic_algorithms(True)
    try:
        assert not flash.takes(q, k, causal=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not flash.takes(q[:, :, :2047], k[:, :, :2047], causal=False)
    assert not flash.takes(q, k[:, :1], causal=False)
    row = q[0].transpose(0, 1)
    assert flash.takes(row, row, causal=False, longest=2048)
    assert not flash.takes(row, row, causal=False, longest=2047)


def assert_near_float64(attend, q, k, v, dout):
    """Distances no more than a fifth above PyTorch's own in the same dtype."""
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = scaled_dot_product_attention(*exact)
    wanted = [want, *torch.autograd.grad(want, exact, dout.double())]
    results = []
    for function in (attend, lambda: scaled_dot_product_attention(q, k, v)):
        out = function()
        results.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    for one, torchs, expected in zip(*results, wanted, strict=True):
        assert distance(one, expected) <= 1.2 * distance(torchs, expected)


def distance(got, want):
    return float((got.double() - want).norm() / want.norm())


def test_without_the_package_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(flash, "find_spec", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    flash._installed.cache_clear()
    try:
        assert not flash._installed()
    finally:
        flash._installed.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu_a_checkpointed_layer_may_be_the_first_to_ask():
    q, k, v, dout = tensors(1, 2, 2048, 88, device="cuda", dtype=torch.bfloat16)
    flash._checked.clear()

    def layer(q, k, v):
        assert flash.takes(q, k, causal=False), "install fvlm-core[flash]; a Hopper GPU is needed"
        return flash.attention(q * 1, k, v, causal=False, scale=0.1)

    want = torch.autograd.grad(layer(q, k, v), (q, k, v), dout)
    flash._checked.clear()
    out = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False)
    for one, expected in zip(torch.autograd.grad(out, (q, k, v), dout), want, strict=True):
        assert distance(one, expected.double()) < 1e-3
