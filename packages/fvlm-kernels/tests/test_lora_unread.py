"""An MLP whose result nobody reads: computed again under gradient checkpointing for its gradients alone."""

from __future__ import annotations

import pytest
import torch

from fvlm_kernels import LoRALinear, lora_mlp, quantize_nf4
from fvlm_kernels.testing import poisoned_memory, randn

WIDTHS = {"gate": (32, 64), "up": (32, 64), "down": (24, 32)}


def parts(device, dtype, names, dropout=0.0):
    """Adapted layers, and all that wants a gradient."""
    layers, leaves = [], {}
    for i, name in enumerate(names):
        out_features, in_features = WIDTHS[name]
        w = randn(out_features, in_features, dtype=dtype, device=device, seed=i, scale=in_features**-0.5)
        a = randn(4, in_features, dtype=torch.float32, device=device, seed=10 + i, scale=in_features**-0.5)
        b = randn(out_features, 4, dtype=torch.float32, device=device, seed=20 + i, scale=0.5)
        bias = randn(out_features, dtype=dtype, device=device, seed=30 + i)
        leaves |= {f"{name}_{key}": t.requires_grad_() for key, t in (("a", a), ("b", b), ("bias", bias))}
        layers.append(LoRALinear(quantize_nf4(w, impl="torch"), a, b, 0.5, bias, dropout))
    return layers, leaves


def gradients(x, layers, leaves, activation, impl, unread, wanted=None):
    gate, *up, down = layers
    y = lora_mlp(x, gate, up[0] if up else None, down, activation, impl=impl, unread=unread)
    names = list(leaves) if wanted is None else wanted
    dy = randn(*y.shape, dtype=y.dtype, device=y.device, seed=99)
    return y.detach(), torch.autograd.grad(y, [leaves[n] for n in names], dy)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("names", "activation"), [(("gate", "up", "down"), "silu"), (("gate", "down"), "quick_gelu")])
def test_gradients_are_the_same_bits(names, activation, impl, dtype, device):
    layers, leaves = parts(device, dtype, names)
    leaves["x"] = x = randn(7, 64, dtype=dtype, device=device, seed=5).requires_grad_()
    _, expected = gradients(x, layers, leaves, activation, impl, False)
    _, found = gradients(x, layers, leaves, activation, impl, True)
    for name, a, b in zip(leaves, found, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("wanted", [["down_b"], ["down_a"], ["down_bias"], ["gate_b"], ["x"]], ids=lambda w: w[0])
def test_each_gradient_alone(wanted, device):
    layers, leaves = parts(device, torch.float32, ("gate", "up", "down"))
    leaves["x"] = x = randn(7, 64, dtype=torch.float32, device=device, seed=5).requires_grad_()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    _, expected = gradients(x, layers, leaves, "silu", None, False, wanted)
    _, found = gradients(x, layers, leaves, "silu", None, True, wanted)
    assert torch.equal(found[0], expected[0])


def test_values_are_not_computed(device):
    layers, leaves = parts(device, torch.float32, ("gate", "up", "down"))
    x = randn(7, 64, dtype=torch.float32, device=device, seed=5)
    with poisoned_memory():
        y, _ = gradients(x, layers, leaves, "silu", "torch", True)
    assert y.isnan().all()


def test_values_are_computed_where_dropout_acts(device):
    layers, leaves = parts(device, torch.float32, ("gate", "up", "down"), dropout=0.5)
    x = randn(7, 64, dtype=torch.float32, device=device, seed=5)
    torch.manual_seed(0)
    expected, grads = gradients(x, layers, leaves, "silu", "torch", False)
    torch.manual_seed(0)
    found, again = gradients(x, layers, leaves, "silu", "torch", True)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.gpu
def test_backward_holds_the_hidden_activation_or_its_gradient_not_both():
    rows, width, hidden = 4096, 256, 8192
    w = [torch.randn(hidden, width, device="cuda", dtype=torch.bfloat16) * 0.05]
    w.append(torch.randn(width, hidden, device="cuda", dtype=torch.bfloat16) * 0.01)
    layers = []
    for one in w:
        a = torch.randn(16, one.shape[1], device="cuda", dtype=torch.bfloat16, requires_grad=True)
        b = torch.randn(one.shape[0], 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layers.append(LoRALinear(one, a, b))
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = lora_mlp(x, layers[0], None, layers[1], "gelu")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y.backward(torch.ones_like(y))
    one_activation = rows * hidden * 2
    assert torch.cuda.max_memory_allocated() - before < 1.6 * one_activation  # and dx
