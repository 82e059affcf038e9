"""The packed vision attention equals stock SDPA image by image: values, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F

import fvlm_kernels
from fvlm_core import attention
from fvlm_core.attention import varlen_attention_forward


def packed_inputs(lengths, heads=2, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, sum(lengths), head_dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    return q, k, v, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def one_by_one(q, k, v, lengths, scaling, is_causal):
    pieces = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*qkv, scale=scaling, is_causal=is_causal) for qkv in pieces]
    return torch.cat(outs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 7, 1], [9]])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_attention_image_by_image(lengths, is_causal):
    q, k, v, cu_lengths = packed_inputs(lengths)
    out, weights = varlen_attention_forward(
        torch.nn.Identity(),
        q,
        k,
        v,
        None,
        scaling=0.3,
        cu_seq_lens_q=cu_lengths,
        max_length_q=max(lengths),
        is_causal=is_causal,
    )
    expected = one_by_one(q, k, v, lengths, 0.3, is_causal)
    assert weights is None
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn(out.shape, dtype=out.dtype)
    for ours, stock in zip(
        torch.autograd.grad((out * probe).sum(), (q, k, v)),
        torch.autograd.grad((expected * probe).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def test_refuses_a_call_without_lengths():
    q, k, v, _ = packed_inputs([3])
    with pytest.raises(ValueError, match="cumulative lengths"):
        varlen_attention_forward(torch.nn.Identity(), q, k, v, None, scaling=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ragged_images_on_a_gpu_are_as_exact_as_sdpa(dtype):
    lengths = [64, 81, 17]
    q64, k64, v64, cu_lengths = packed_inputs(lengths, heads=4, head_dim=80)
    exact = one_by_one(q64, k64, v64, lengths, 80**-0.5, False)
    low = [t.detach().to("cuda", dtype).requires_grad_() for t in (q64, k64, v64)]
    ours, _ = varlen_attention_forward(
        torch.nn.Identity(), *low, None, 80**-0.5, cu_seq_lens_q=cu_lengths.cuda(), max_length_q=max(lengths)
    )
    stock = one_by_one(*low, lengths, 80**-0.5, False)
    grads = [torch.autograd.grad(t.double().sum(), leaves) for t, leaves in ((ours, low), (stock, low))]
    exact_grads = torch.autograd.grad(exact.sum(), (q64, k64, v64))
    for got, peer, truth in zip((ours, *grads[0]), (stock, *grads[1]), (exact, *exact_grads), strict=True):
        error, allowed = ((t.detach().cpu().double() - truth.detach()).abs().max() for t in (got, peer))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("is_causal", [False, True])
def test_what_goes_to_the_kernels_comes_back_in_place(is_causal, monkeypatch):
    """The layout, the scale and the mask of the GPU's path, held on a CPU by the kernels' own reference."""
    called = []

    def by_reference(*args, impl, **options):
        called.append(impl)
        return fvlm_kernels.varlen_attention(*args, impl="torch", **options)

    monkeypatch.setattr(attention, "runs_flash", lambda q: True)
    monkeypatch.setattr(attention, "varlen_attention", by_reference)
    lengths = [4, 7, 1]
    q, k, v, cu_lengths = packed_inputs(lengths)
    out, _ = varlen_attention_forward(
        torch.nn.Identity(), q, k, v, None, 0.3, cu_seq_lens_q=cu_lengths, max_length_q=7, is_causal=is_causal
    )
    assert called == ["flash"]
    torch.testing.assert_close(out, one_by_one(q, k, v, lengths, 0.3, is_causal), rtol=1e-12, atol=1e-12)
