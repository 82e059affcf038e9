"""What linear_cross_entropy spends: memory, products, waiting; and what it returns beside the loss."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fvlm_kernels import _loss_chunks, _losses, linear_cross_entropy
from fvlm_kernels.testing import randn, run_with_gradients

every_impl = pytest.mark.parametrize("impl", ["torch", "triton"])


def labels_of(shape, classes, device, ignored=True):
    labels = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(3))
    if ignored:
        labels.view(-1)[::3] = -100
    return labels.to(device)


def head_of(shape, k, v, dtype, device, bias=True):
    tensors = {
        "hidden": randn(*shape, k, dtype=dtype, device=device, seed=1),
        "weight": randn(v, k, dtype=dtype, device=device, seed=2, scale=2 * k**-0.5),
    }
    return tensors | ({"bias": randn(v, dtype=dtype, device=device, seed=4)} if bias else {})


def test_chunks_are_even_bounded_and_whole_tiles(monkeypatch):
    rows = partial(_loss_chunks.chunk_rows, v=151936, k=1536, itemsize=2)
    assert rows(2730, trained=False) == 768  # 4 chunks of at most 883 rows
    assert rows(2730, trained=True) == 1408  # 2 of at most 1536
    assert rows(100, trained=False) == 128
    assert rows(0, trained=False) == 128
    for m in range(1, 4000, 37):
        assert rows(m, trained=False) * 151936 * 2 <= 2**28
    monkeypatch.setattr(_loss_chunks, "CHUNK_BYTES", 1)
    assert rows(5, trained=False) == 1


def plainly(hidden, weight, labels):
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels)


class Largest(TorchDispatchMode):
    """Remembers the most bytes that any operation returned in one tensor."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, tuple | list) else (result,)
        self.nbytes = max([self.nbytes, *(t.nbytes for t in returned if isinstance(t, torch.Tensor))])
        return result


def test_backward_holds_no_second_gradient_of_the_head_in_fp32(device):
    hidden, weight, _ = head_of((6,), 8, 500, torch.float16, device).values()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels_of((6,), 500, device), impl="triton")
    with Largest() as seen:
        (grad,) = torch.autograd.grad(loss * 3.0, weight)
    assert seen.nbytes == grad.nbytes == 500 * 8 * 2
    exact = torch.autograd.grad(plainly(hidden.double(), weight.double(), labels_of((6,), 500, device)) * 3.0, weight)
    torch.testing.assert_close(grad, exact[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_rows_times_vocabulary(reduction, monkeypatch, device):
    m, k, v = 64, 8, 1000
    monkeypatch.setattr(_loss_chunks, "CHUNK_BYTES", 9 * v * 4)
    labels, tensors = labels_of((m,), v, device), head_of((m,), k, v, torch.float32, device)

    def measured(fn):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        with Largest() as largest:
            fn(*leaves).sum().backward()
        return largest.nbytes

    def plain(hidden, weight, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)

    torch_ = partial(linear_cross_entropy, labels=labels, reduction=reduction, impl="torch")
    assert measured(lambda hidden, weight, bias: torch_(hidden, weight, bias=bias)) <= 9 * v * 4
    assert measured(plain) == m * v * 4
    with Largest() as largest:  # an operator is one call to the mode: look into its launcher
        _loss_chunks._rows(*tensors.values(), labels, None, -100, None, True, True, True, True)
    assert largest.nbytes <= 9 * v * 4


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [True, False])
def test_peak_memory(trained):
    m, k, v = 8192, 1024, 128256
    hidden = torch.randn(m, k, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, k, device="cuda", dtype=torch.bfloat16).requires_grad_(trained)
    labels = torch.randint(0, v, (m,), device="cuda")
    linear_cross_entropy(hidden, weight, labels).backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels).backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradient = v * k * (4 + 4 + 2) if trained else 0  # kept in fp32, multiplied, rounded
    assert peak < 2**28 + gradient + 2**27 < m * v * 2


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_where_rows_are_given():
    labels = labels_of((64,), 1000, "cuda")
    rows = (labels != -100).nonzero().squeeze(1)
    hidden = torch.randn(64, 32, device="cuda").requires_grad_()
    weight, items = torch.randn(1000, 32, device="cuda"), torch.tensor(17, device="cuda")
    linear_cross_entropy(hidden, weight, labels, rows=rows).backward()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({"num_items": items}, {"return_stats": True}, {"reduction": "none"}):
            linear_cross_entropy(hidden, weight, labels, rows=rows, **options)
        linear_cross_entropy(hidden, weight, labels, rows=rows).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ignored_rows_do_not_reach_a_product(device, monkeypatch):
    labels = torch.tensor([-100, 3, -100, 4, -100, -100], device=device)
    seen, operator = [], _loss_chunks.loss_of_rows
    module = __import__(linear_cross_entropy.__module__, fromlist=["loss_of_rows"])
    monkeypatch.setattr(
        module, "loss_of_rows", lambda hidden, *rest: seen.append(len(hidden)) or operator(hidden, *rest)
    )
    tensors = head_of((6,), 8, 20, torch.float32, device)
    tensors["hidden"][0] = float("nan")
    loss, grads = run_with_gradients(partial(linear_cross_entropy, labels=labels, impl="triton"), tensors, ["hidden"])
    assert seen == [2]
    assert loss[0].isfinite()
    assert grads["hidden"][1::2][:2].abs().min() > 0
    assert torch.equal(grads["hidden"][[0, 2, 4, 5]], torch.zeros(4, 8, device=device))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_only_for_what_needs_them(reduction, device, monkeypatch):
    tensors, labels = head_of((6,), 16, 50, torch.float32, device), labels_of((6,), 50, device)
    work, product, launch_rows = [], _loss_chunks._product, _loss_chunks.launch_rows

    def counted_product(out, *rest, **keywords):
        work.append(tuple(out.shape))
        product(out, *rest, **keywords)

    def counted_rows(*arguments, overwrite, **keywords):
        work.append("gradient" if overwrite else "loss")
        launch_rows(*arguments, overwrite=overwrite, **keywords)

    monkeypatch.setattr(_loss_chunks, "_product", counted_product)
    monkeypatch.setattr(_loss_chunks, "launch_rows", counted_rows)
    ours = partial(linear_cross_entropy, labels=labels, reduction=reduction, impl="triton")
    shapes = {"hidden": (4, 16), "weight": (50, 16)}
    for wanted in (["hidden"], ["weight"], ["bias"], ["hidden", "weight", "bias"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
        ours(**leaves).sum().backward()
        assert [n for n, t in leaves.items() if t.grad is not None] == wanted
        forward = ["loss"] if reduction == "none" else []
        assert work == [*forward, "gradient", *(shapes[n] for n in wanted if n in shapes)]
        work.clear()
    with torch.no_grad():
        assert not ours(**{n: t.clone().requires_grad_() for n, t in tensors.items()}).requires_grad
    assert not ours(**tensors).requires_grad
    assert work == ["loss", "loss"]


@every_impl
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_stats_are_accuracy_and_entropy(softcap, impl, dtype, device):
    labels, tensors = labels_of((40,), 12, device), head_of((40,), 16, 12, dtype, device)
    logits = torch.nn.functional.linear(*tensors.values()).double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = labels != -100
    right = (logits.argmax(-1) == labels) & kept
    entropy = torch.distributions.Categorical(logits=logits).entropy() * kept
    assert 0 < right.sum() < kept.sum()
    ours = partial(linear_cross_entropy, **tensors, labels=labels, softcap=softcap, impl=impl, return_stats=True)
    loss, stats = ours()
    assert torch.equal(loss, linear_cross_entropy(**tensors, labels=labels, softcap=softcap, impl=impl))
    assert (stats.correct, stats.items) == (right.sum(), kept.sum())
    torch.testing.assert_close(stats.entropy.double(), entropy.sum(), rtol=1e-3, atol=0)
    _, each = ours(reduction="none")
    assert torch.equal(each.correct.bool(), right)
    assert torch.equal(each.items, kept)
    torch.testing.assert_close(each.entropy.double(), entropy, rtol=2e-3, atol=1e-4)
    assert not stats.entropy.requires_grad


@every_impl
def test_the_first_of_equals_is_the_most_likely(impl, device, monkeypatch):
    monkeypatch.setattr(_losses, "BLOCK_V", 128)
    weight = torch.zeros(300, 1, device=device)
    weight[[5, 133, 140]] = 1.0  # 5 and 133 fall to the same lane
    labels = torch.tensor([5, 133, 140, 0], device=device)
    _, stats = linear_cross_entropy(
        torch.ones(4, 1, device=device), weight, labels, reduction="none", return_stats=True, impl=impl
    )
    assert stats.correct.tolist() == [1, 0, 0, 0]


@every_impl
@pytest.mark.parametrize("slope", [0.0, 0.02, -0.02, 0.5, 50.0])
def test_entropy_of_certain_and_uncertain_rows(slope, impl, device, monkeypatch):
    monkeypatch.setattr(_losses, "BLOCK_V", 128)
    weight = slope * torch.arange(400.0, device=device).unsqueeze(1)
    weight[300:] = float("-inf")
    hidden, labels = torch.ones(1, 1, device=device), torch.tensor([7], device=device)
    _, stats = linear_cross_entropy(hidden, weight, labels, return_stats=True, impl=impl)
    expected = torch.distributions.Categorical(logits=weight[:300, 0].double()).entropy()
    torch.testing.assert_close(stats.entropy.double(), expected, rtol=1e-5, atol=1e-6)
