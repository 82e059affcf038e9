from __future__ import annotations

from functools import partial

import pytest
import torch

from fvlm_kernels import _losses, cross_entropy
from fvlm_kernels.testing import (
    assert_deterministic,
    check_against_reference,
    poisoned_memory,
    randn,
    strided,
    transposed,
)

SHAPES = [(8, 64), (5, 100), (1, 1), (1, 7), (2, 3, 80), (40, 33), (2, 1536)]
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.25},
    "z_loss": {"z_loss": 0.01},
    "all": {"softcap": 1.5, "scale": 1.7, "z_loss": 0.002},
}


def labels_of(shape, device, ignored=True):
    labels = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(3))
    if ignored:
        labels.view(-1)[::3] = -100
    return labels.to(device)


def plainly(logits, labels, softcap=None, scale=1.0, z_loss=0.0, reduction="none"):
    """What a user would write, on logits in fp32 (or float64)."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if z_loss == 0:
        flat = z.reshape(-1, z.shape[-1]), labels.reshape(-1)
        loss = torch.nn.functional.cross_entropy(*flat, reduction=reduction)
        return loss.view(labels.shape) if reduction == "none" else loss
    kept, lse = labels != -100, z.logsumexp(-1)
    picked = z.gather(-1, labels.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept, lse - picked + z_loss * lse * lse, 0.0)


def check(logits, labels, impl="triton", reduction="none", **options):
    check_against_reference(
        lambda logits: cross_entropy(logits, labels, impl=impl, reduction=reduction, **options),
        lambda logits: plainly(logits, labels, reduction=reduction, **options),
        {"logits": logits},
        ["logits"],
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_policy_of_every_option(options, impl, dtype, device):
    logits = randn(9, 300, dtype=dtype, device=device, scale=3.0)
    check(logits, labels_of(logits.shape, device), impl, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy_of_every_shape(shape, dtype, device):
    check(randn(*shape, dtype=dtype, device=device, scale=2.0), labels_of(shape, device), softcap=5.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_policy_of_reductions(reduction, dtype, device):
    logits = randn(12, 100, dtype=dtype, device=device)
    check(logits, labels_of(logits.shape, device), reduction=reduction)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_row_of_several_blocks(options, dtype, device, monkeypatch):
    monkeypatch.setattr(_losses, "BLOCK_V", 128)
    logits = randn(7, 333, dtype=dtype, device=device, scale=4.0)
    labels = labels_of(logits.shape, device)
    labels[1], labels[2] = 0, 332  # the first and the last column
    check(logits, labels, **options)


def test_a_vocabulary_of_many_blocks(device):
    logits = randn(2, 3 * _losses.BLOCK_V + 17, dtype=torch.float16, device=device, scale=2.0)
    check(logits, torch.tensor([3 * _losses.BLOCK_V + 16, 5], device=device))


@pytest.mark.parametrize("layout", [strided, transposed])
def test_policy_where_not_contiguous(layout, dtype, device):
    logits = layout(randn(6, 48, dtype=dtype, device=device))
    check(logits, labels_of(logits.shape, device).repeat_interleave(2)[::2])


def test_an_expanded_gradient_and_one_with_gaps(device):
    logits = randn(6, 48, dtype=torch.float32, device=device)
    labels = labels_of(logits.shape, device, ignored=False)
    for wide in (torch.ones(1, device=device).expand(6), torch.arange(12.0, device=device)[::2]):
        grads = []
        for impl in ("torch", "triton"):
            leaf = logits.clone().requires_grad_()
            cross_entropy(leaf, labels, reduction="none", impl=impl).backward(wide)
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1])


def test_nearly_certain_rows_keep_their_digits(device):
    """Where the largest logit is large, its sum with a small logarithm would round both away: 3e-5 at 512."""
    logits = randn(16, 64, dtype=torch.float32, device=device)
    logits[:, 5] = 512.0
    logits[:, 6] = 512.0 - torch.arange(3.0, 5.0, 0.125, device=device)
    labels, results = torch.full((16,), 5, device=device), []
    for leaf, impl in ((logits.clone(), "triton"), (logits.double(), "torch")):
        losses = cross_entropy(leaf.requires_grad_(), labels, reduction="none", impl=impl)
        results.append((losses, torch.autograd.grad(losses.sum(), leaf)[0]))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() < 5e-7  # four roundings at 1


def test_softcap_of_small_logits_keeps_their_digits(device):
    logits = randn(8, 32, dtype=torch.float32, device=device, scale=1e-4)
    check(logits * 30, labels_of(logits.shape, device, ignored=False), softcap=30.0)
    dlogits = []
    for kind in (torch.float32, torch.float64):
        leaf = logits.to(kind).requires_grad_()
        loss = cross_entropy(
            leaf, labels_of(logits.shape, device), softcap=30.0, impl=None if kind.itemsize > 4 else "triton"
        )
        dlogits.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(dlogits[0].double(), dlogits[1], rtol=1e-6, atol=1e-9)


def test_masked_out_columns(device):
    logits = randn(5, 300, dtype=torch.float32, device=device)
    logits[:, 7:290] = float("-inf")
    labels = torch.tensor([0, 1, 295, 299, -100], device=device)
    check(logits, labels)
    check(logits, labels, softcap=3.0)  # the cap makes them finite


def test_ignored_rows_are_not_even_read(device):
    logits = randn(4, 50, dtype=torch.float32, device=device)
    labels = torch.tensor([3, -100, 4, -100], device=device)
    expected = cross_entropy(logits, labels, impl="triton")
    logits[1], logits[3] = float("nan"), float("inf")
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, labels, impl="triton")
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(leaf.grad[1::2], torch.zeros_like(leaf.grad[1::2]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_another_ignore_index_and_int32_labels(impl, device):
    logits = randn(4, 10, dtype=torch.float32, device=device)
    labels = torch.tensor([0, 3, 0, 9], device=device)
    ours = cross_entropy(logits, labels.int(), ignore_index=0, impl=impl)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, ignore_index=0))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (2, 0, 8)], ids=str)
def test_no_row_to_score_gives_what_pytorch_gives(impl, shape, device):
    labels = torch.full(shape[:-1], -100, device=device)
    for reduction in ("mean", "sum", "none"):
        with poisoned_memory():
            logits = torch.ones(shape, device=device, requires_grad=True)
            loss = cross_entropy(logits, labels, reduction=reduction, impl=impl)
            (grad,) = torch.autograd.grad(loss.sum(), logits)
        plain = plainly(torch.ones(shape, device=device), labels, reduction=reduction)
        assert torch.equal(torch.nan_to_num(loss.detach(), 7.0), torch.nan_to_num(plain, 7.0))
        assert torch.equal(grad, torch.zeros_like(grad))
    assert cross_entropy(logits, labels, num_items=5, impl=impl) == 0


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_num_items_divides_the_sum(impl, device):
    logits = randn(6, 20, dtype=torch.float32, device=device)
    labels = labels_of(logits.shape, device)
    expected = plainly(logits, labels, reduction="sum") / 7
    for items in (7, 7.0, torch.tensor(7), torch.tensor(7, device=device), torch.tensor(7.0, dtype=torch.float64)):
        loss = cross_entropy(logits, labels, num_items=items, impl=impl)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)


def test_labels_out_of_range_give_nan_and_read_nothing(device):
    logits = randn(3, 40, dtype=torch.float32, device=device)
    labels = torch.tensor([40, -1, 3], device=device)
    losses, norms = torch.ops.fvlm.cross_entropy_fwd(logits, labels, -100, 1.0, None, 0.0)
    assert losses.isnan().tolist() == [True, True, False]
    grad = torch.ops.fvlm.cross_entropy_bwd(torch.ones_like(losses), logits, labels, norms, -100, 1.0, None, 0.0)
    assert grad.isnan().all(1).tolist() == [True, True, False]


def test_nan_in_a_scored_row_shows(device):
    logits = randn(2, 300, dtype=torch.float32, device=device)
    logits[1, 299] = float("nan")
    losses = cross_entropy(logits, torch.tensor([4, 5], device=device), reduction="none", impl="triton")
    assert losses.isnan().tolist() == [False, True]


def test_two_runs_give_the_same_bits(dtype, device):
    logits = randn(9, 300, dtype=dtype, device=device)
    ours = partial(cross_entropy, labels=labels_of(logits.shape, device), impl="triton", softcap=3.0)
    assert_deterministic(ours, {"logits": logits}, ["logits"])


def test_logits_keep_their_values_and_get_their_gradient_twice(device):
    logits = randn(5, 64, dtype=torch.float32, device=device)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, labels_of(logits.shape, device), impl="triton")
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(leaf.detach(), logits)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    rows, vocabulary = 2**14 + 5, 2**17 + 8
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    leaf = logits[-4:].clone().requires_grad_()
    small = cross_entropy(leaf, labels[-4:], reduction="none")
    (expected,) = torch.autograd.grad(small.sum(), leaf)
    losses = cross_entropy(logits.requires_grad_(), labels, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(losses[-4:], small)
    assert torch.equal(grad[-4:], expected)
