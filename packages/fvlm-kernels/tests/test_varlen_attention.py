from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch

from fvlm_kernels import varlen_attention
from fvlm_kernels.testing import check_against_reference, randn, run_with_gradients
from fvlm_kernels.varlen_attention import HAS_VARLEN, has_flash

LENGTHS = [[5], [3, 1, 7], [4, 0, 2, 0], [64, 17]]


def inputs_of(lengths, dtype, device, heads=4, kv_heads=2, width=32):
    total = sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return {
        "q": randn(total, heads, width, dtype=dtype, device=device, seed=1),
        "k": randn(total, kv_heads, width, dtype=dtype, device=device, seed=2),
        "v": randn(total, kv_heads, width, dtype=dtype, device=device, seed=3),
        "cu_seqlens": cu,
    }


def masked(q, k, v, cu_seqlens, causal=False, scale=None):
    """The definition: one dense softmax over all tokens, other segments masked."""
    total, heads, width = q.shape
    place = torch.arange(total, device=q.device)
    segment = torch.bucketize(place, cu_seqlens[1:], right=True)
    seen = segment[:, None] == segment[None, :]
    if causal:
        seen = seen & (place[:, None] >= place[None, :])
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("thd,shd->hts", q, k).to(wide) * (1 / math.sqrt(width) if scale is None else scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("hts,shd->thd", weights, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("impl", ["torch", pytest.param("flash", marks=pytest.mark.gpu)])
def test_policy(lengths, causal, impl, dtype, device):
    tensors = inputs_of(lengths, dtype, device)
    ours = partial(varlen_attention, causal=causal, impl=impl)
    if impl == "flash" and dtype == torch.float32:
        with pytest.raises(ValueError, match="it needs fp16 or bf16"):
            ours(**tensors)
        return
    check_against_reference(ours, partial(masked, causal=causal), tensors, ["q", "k", "v"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5], [6, 6, 6]], ids=str)
def test_segments_of_one_length_as_a_batch(lengths, causal, dtype, device):
    tensors = inputs_of(lengths, dtype, device)
    ours = partial(varlen_attention, causal=causal, max_seqlen=lengths[0], impl="batched")
    check_against_reference(ours, partial(masked, causal=causal), tensors, ["q", "k", "v"])


def test_slices_of_a_fused_projection(device):
    """What a tower gives: queries, keys and values out of one tensor, whose gradient is one tensor again."""
    lengths, qkv = [4, 4], randn(8, 3, 2, 32, dtype=torch.float32, device=device)
    cu = inputs_of(lengths, torch.float32, device)["cu_seqlens"]
    for impl in ("batched", "torch"):
        given, apart = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
        out = varlen_attention(*given.unbind(1), cu, 4, impl=impl)
        expected = masked(*(t.contiguous() for t in apart.unbind(1)), cu)
        torch.testing.assert_close(out, expected)
        out.pow(2).sum().backward()
        expected.pow(2).sum().backward()
        torch.testing.assert_close(given.grad, apart.grad)


def test_a_batch_compiles_and_exports(device):
    tensors = inputs_of([4, 4], torch.float32, device)

    class Module(torch.nn.Module):
        def forward(self, **tensors):
            return varlen_attention(**tensors, max_seqlen=4, causal=True, impl="batched")

    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    eager, fused = (run_with_gradients(f, tensors, ["q", "k", "v"]) for f in (Module(), compiled))
    torch.testing.assert_close(eager, fused)
    program = torch.export.export(Module(), (), tensors)
    torch.testing.assert_close(program.module()(**tensors), eager[0][0])


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "called"), [([64, 64], "_batched"), ([64, 60], "_flash"), ([64], "_batched")])
def test_what_is_chosen(lengths, called, monkeypatch, device):
    from fvlm_kernels import varlen_attention as op

    module, seen = sys.modules[op.__module__], []
    for name in ("_batched", "_flash"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, call=original: (seen.append(name), call(*a))[1])
    varlen_attention(**inputs_of(lengths, torch.bfloat16, device), max_seqlen=64)
    assert seen == [called]


def test_scale(device):
    # Enough elements that the largest error of each side says something about its rounding, and not about chance.
    tensors = inputs_of([30, 41], torch.float32, device, heads=2, kv_heads=2)
    check_against_reference(
        partial(varlen_attention, scale=0.25), partial(masked, scale=0.25), tensors, ["q", "k", "v"]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 72, 80, 128])
def test_flash_at_real_head_sizes(width, device):
    tensors = inputs_of([257, 64, 130], torch.bfloat16, device, heads=16, kv_heads=16, width=width)
    check_against_reference(partial(varlen_attention, max_seqlen=257), masked, tensors, ["q", "k", "v"])


@pytest.mark.skipif(not HAS_VARLEN, reason="torch has no varlen_attn before 2.11")
def test_flash_is_for_cards_that_have_it(monkeypatch):
    found = {}
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        found[capability] = has_flash(torch.device("cuda", 0), torch.float16)
    assert found == {(7, 5): False, (8, 0): True, (9, 0): True}


def test_a_segment_does_not_see_another(device):
    tensors = inputs_of([3, 4], torch.float32, device)
    before = varlen_attention(**tensors)
    tensors["v"][3:] += 100
    tensors["k"][3:] += 1
    assert torch.equal(varlen_attention(**tensors)[:3], before[:3])


def test_empty(device):
    tensors = inputs_of([0], torch.float32, device)
    (out,), grads = run_with_gradients(varlen_attention, tensors, ["q"])
    assert out.shape == grads["q"].shape == (0, 4, 32)


@pytest.mark.gpu
def test_flash_needs_no_host_when_the_longest_is_known():
    tensors = inputs_of([5, 9], torch.bfloat16, torch.device("cuda"))
    varlen_attention(**tensors, max_seqlen=9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        varlen_attention(**tensors, max_seqlen=9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_flash_compiles_as_one_graph():
    tensors = inputs_of([5, 9], torch.bfloat16, torch.device("cuda"))
    compiled = torch.compile(partial(varlen_attention, max_seqlen=9), fullgraph=True)
    eager, fused = (
        run_with_gradients(f, tensors, ["q", "k", "v"]) for f in (partial(varlen_attention, max_seqlen=9), compiled)
    )
    torch.testing.assert_close(eager, fused)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "it must rise from 0 to 5"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, "starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, ValueError, "it must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "torch.float32; it must be int32"),
        ({"cu_seqlens": torch.tensor(5)}, ValueError, "cu_seqlens has shape"),
        ({"k": torch.ones(5, 3, 8), "v": torch.ones(5, 3, 8)}, ValueError, "H a multiple of Hkv"),
        ({"v": torch.ones(5, 1, 8)}, ValueError, "v has shape"),
        ({"q": torch.ones(5, 4, 8, dtype=torch.float16)}, TypeError, "k has torch.float32"),
        ({"impl": "triton"}, ValueError, "impl is 'triton'"),
        ({"impl": "flash"}, ValueError, "it needs fp16 or bf16"),
        ({"impl": "batched"}, ValueError, "it needs segments of one length"),
        ({"impl": "batched", "max_seqlen": 3}, ValueError, "2 segments, max_seqlen 3 and 5 tokens"),
        (
            {"impl": "batched", "max_seqlen": 1, "cu_seqlens": torch.tensor([0, 2, 2, 3, 4, 5])},
            ValueError,
            "not every segment of cu_seqlens",
        ),
    ],
)
def test_bad_input_gets_one_sentence(change, error, words):
    arguments = {
        "q": torch.ones(5, 4, 8),
        "k": torch.ones(5, 2, 8),
        "v": torch.ones(5, 2, 8),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        **change,
    }
    with pytest.raises(error, match=words) as caught:
        varlen_attention(**arguments)
    assert "\n" not in str(caught.value)
