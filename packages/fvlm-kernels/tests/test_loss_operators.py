"""The cross entropies as operators: `opcheck`, `torch.compile`, `torch.export`, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch

from fvlm_kernels import _loss_chunks, cross_entropy, linear_cross_entropy
from fvlm_kernels.testing import randn, run_with_gradients


def labels_of(rows, classes, device):
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(3))
    labels[::3] = -100
    return labels.to(device)


def head_of(rows, device, dtype=torch.float32):
    shapes = {"hidden": (rows, 16), "weight": (48, 16), "bias": (48,)}
    return {n: randn(*shape, dtype=dtype, device=device, seed=i) for i, (n, shape) in enumerate(shapes.items())}


def backend(device):
    return "inductor" if device.type == "cuda" else "aot_eager"


def assert_same(fn, other, tensors):
    eager, fused = (run_with_gradients(f, tensors, list(tensors)) for f in (fn, other))
    for a, b in zip([*eager[0], *eager[1].values()], [*fused[0], *fused[1].values()], strict=True):
        torch.testing.assert_close(a, b)


def test_cross_entropy_passes_opcheck(device):
    logits, labels = randn(4, 40, dtype=torch.float32, device=device), labels_of(4, 40, device)
    for settings in ((-100, 1.0, None, 0.0), (-100, 0.5, 3.0, 0.01)):
        torch.library.opcheck(torch.ops.fvlm.cross_entropy_fwd.default, (logits, labels, *settings))
        losses, norms = torch.ops.fvlm.cross_entropy_fwd(logits, labels, *settings)
        arguments = (losses, logits, labels, norms, *settings)
        torch.library.opcheck(torch.ops.fvlm.cross_entropy_bwd.default, arguments)


@pytest.mark.parametrize("rows", [5, 0])
def test_linear_cross_entropy_passes_opcheck(rows, device):
    hidden, weight, bias = head_of(rows, device).values()
    labels, weights = labels_of(rows, 48, device), torch.rand(rows, device=device)
    operator = torch.ops.fvlm.linear_cross_entropy.default
    for needs in ((True, True, True), (True, False, False), (False, False, False)):
        torch.library.opcheck(operator, (hidden, weight, bias, labels, weights, -100, 3.0, *needs, True))
        torch.library.opcheck(operator, (hidden, weight, None, labels, None, -100, None, *needs, False))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_cross_entropy_compiles_as_one_graph(impl, device):
    labels = labels_of(6, 48, device)

    def layer(logits):
        return cross_entropy(logits * 2, labels, softcap=4.0, num_items=torch.tensor(3), impl=impl) + 1

    compiled = torch.compile(layer, fullgraph=True, backend=backend(device))
    assert_same(layer, compiled, {"logits": randn(6, 48, dtype=torch.float32, device=device)})


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("given", [True, False], ids=["rows given", "rows not given"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_compiles_as_one_graph(impl, given, reduction, device, monkeypatch):
    if reduction == "none":
        monkeypatch.setattr(_loss_chunks, "CHUNK_BYTES", 2 * 48 * 4)  # chunks of two rows
    labels = labels_of(6, 48, device)
    rows = (labels != -100).nonzero().squeeze(1) if given else None

    def layer(hidden, weight, bias):
        loss, stats = linear_cross_entropy(
            hidden * 2, weight, labels, bias, reduction=reduction, rows=rows, return_stats=True, impl=impl
        )
        return loss + 1, stats.correct + stats.entropy

    torch._dynamo.reset()  # one parameter's specializations are not another's
    compiled, tensors = torch.compile(layer, fullgraph=True, backend=backend(device)), head_of(6, device)
    assert_same(lambda **t: layer(**t)[0], lambda **t: compiled(**t)[0], tensors)
    with torch.no_grad():
        torch.testing.assert_close(layer(**tensors)[1], compiled(**tensors)[1])


def test_cross_entropy_exports(device):
    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return cross_entropy(logits, labels, impl="triton")

    dim = torch.export.Dim("rows", min=2, max=64)
    example = randn(6, 48, dtype=torch.float32, device=device), labels_of(6, 48, device)
    program = torch.export.export(Loss(), example, dynamic_shapes={"logits": {0: dim}, "labels": {0: dim}})
    taller = randn(9, 48, dtype=torch.float32, device=device), labels_of(9, 48, device)
    assert torch.equal(program.module()(*taller), Loss()(*taller))


def test_linear_cross_entropy_exports_with_any_number_of_rows_to_score(device):
    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, labels, rows):
            return linear_cross_entropy(hidden, weight, labels, rows=rows, impl="triton")

    hidden, weight, _ = head_of(9, device).values()
    labels, loss = labels_of(9, 48, device), Loss()
    kept = torch.export.Dim("kept", min=2, max=64)
    rows = torch.tensor([1, 2, 4], device=device)
    shapes = {"hidden": None, "weight": None, "labels": None, "rows": {0: kept}}
    program = torch.export.export(loss, (hidden, weight, labels, rows), dynamic_shapes=shapes)
    more = torch.tensor([1, 2, 4, 5, 7], device=device)
    assert torch.equal(program.module()(hidden, weight, labels, more), loss(hidden, weight, labels, more))


def test_autocast_leaves_cross_entropy_alone(device):
    logits, labels = randn(5, 60, dtype=torch.float32, device=device), labels_of(5, 60, device)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for impl in ("torch", "triton"):
            torch.testing.assert_close(cross_entropy(logits, labels, impl=impl), plain)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_casts_what_goes_into_the_product(impl, reduction, device):
    low = torch.bfloat16 if device.type == "cuda" else torch.float16
    labels, grads = labels_of(7, 48, device), []
    for cast in (True, False):
        leaves = [t.requires_grad_() for t in head_of(7, device).values()]
        with torch.autocast(device.type, dtype=low, enabled=cast):
            hidden, weight, bias = leaves if cast else [t.to(low) for t in leaves]
            loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, impl=impl)
            exact = linear_cross_entropy(hidden.double(), weight.double(), labels, bias.double(), reduction=reduction)
        assert loss.dtype == torch.float32
        assert exact.dtype == torch.float64
        grads.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    assert {g.dtype for g in grads[0]} == {torch.float32}
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_recomputes_the_same_gradient(reduction, reentrant, device):
    labels, grads = labels_of(7, 48, device), []
    for wrap in (False, True):
        hidden, weight, bias = (t.requires_grad_() for t in head_of(7, device).values())

        def loss(h, w=weight, b=bias):
            return linear_cross_entropy(h, w, labels, b, reduction=reduction, impl="triton")

        value = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=reentrant) if wrap else loss(hidden)
        value.sum().backward()
        grads.append([hidden.grad, weight.grad, bias.grad])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_by_the_kernels_and_given_by_pytorch(reduction, device, monkeypatch):
    if reduction == "none":
        monkeypatch.setattr(_loss_chunks, "CHUNK_BYTES", 2 * 48 * 4)  # chunks of two rows
    hidden, weight, bias = (t.requires_grad_() for t in head_of(5, device).values())
    labels = labels_of(5, 48, device)
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, impl="triton").sum()
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(cross_entropy(hidden, labels.clamp(max=15), impl="triton"), hidden, create_graph=True)
    second = []
    for plain in (False, True):
        if plain:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction=reduction).sum()
        else:
            loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, impl="torch").sum()
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*second)
