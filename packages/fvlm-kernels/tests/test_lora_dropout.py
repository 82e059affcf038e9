from __future__ import annotations

import pytest
import torch

from fvlm_kernels import LoRALinear, lora_linear, lora_mlp, lora_qkv
from fvlm_kernels.testing import randn


def layers_of(*shapes, dtype=torch.float32, device="cpu", dropout=0.3, zero_base=False):
    made = []
    for i, (out_features, in_features) in enumerate(shapes):
        w = randn(out_features, in_features, dtype=dtype, device=device, seed=i, scale=0 if zero_base else 0.2)
        a = randn(4, in_features, dtype=dtype, device=device, seed=50 + i, scale=0.2).requires_grad_()
        b = randn(out_features, 4, dtype=dtype, device=device, seed=90 + i).requires_grad_()
        made.append(LoRALinear(w, a, b, 0.5, None, dropout))
    return made


def test_drops_the_asked_share_and_keeps_the_mean(device):
    n = 256
    eye = torch.eye(n, device=device)
    layer = LoRALinear(torch.zeros(n, n, device=device), eye, eye, 1.0, None, 0.25)
    y = lora_linear(torch.ones(400, n, device=device), layer)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.75))
    assert abs((y == 0).float().mean().item() - 0.25) < 0.005  # 100k draws: the deviation is 0.0014
    assert ((y == 0).float().mean(0) - 0.25).abs().max() < 0.12  # no column and no row is favoured
    assert ((y == 0).float().mean(1) - 0.25).abs().max() < 0.15


def test_layers_of_one_input_drop_independently(device):
    eye = torch.eye(64, device=device)
    layer = LoRALinear(torch.zeros(64, 64, device=device), eye, eye, 1.0, None, 0.5)
    first, second = (y != 0 for y in lora_qkv(torch.ones(200, 64, device=device), [layer, layer]))
    assert abs((first & second).float().mean().item() - 0.25) < 0.03


def test_evaluation_drops_nothing(device):
    (layer,) = layers_of((6, 8), device=device)
    x = randn(5, 8, dtype=torch.float32, device=device)
    whole = LoRALinear(layer.base, layer.a, layer.b, layer.scaling)
    assert torch.equal(lora_linear(x, layer, training=False), lora_linear(x, whole))
    assert not torch.equal(lora_linear(x, layer), lora_linear(x, whole))


def test_dropping_everything_leaves_the_base(device):
    (layer,) = layers_of((6, 8), device=device, dropout=1.0)
    x = randn(5, 8, dtype=torch.float32, device=device).requires_grad_()
    y = lora_linear(x, layer)
    assert torch.equal(y, x @ layer.base.t())
    dx, da = torch.autograd.grad(y.sum(), (x, layer.a))
    torch.testing.assert_close(dx, layer.base.sum(0).expand_as(dx))
    assert not da.any()


def test_same_seed_same_masks(device):
    (layer,) = layers_of((6, 8), device=device)
    x = randn(5, 8, dtype=torch.float32, device=device)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(lora_linear(x, layer))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_linear_is_peft_with_the_same_seed(device):
    """torch.nn.Dropout and these ops draw alike, so a run with a seed is a PEFT run with that seed."""
    (layer,) = layers_of((6, 8), device=device)
    x = randn(5, 8, dtype=torch.float32, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(3)
    ours = lora_linear(leaves[0], layer)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(leaves[1], 0.3, training=True)
    plain = leaves[1] @ layer.base.t() + (dropped @ layer.a.t() @ layer.b.t()) * 0.5
    torch.testing.assert_close(ours, plain)
    cotangent = torch.randn_like(ours)
    grads = [
        torch.autograd.grad(y, [leaf, layer.a, layer.b], cotangent)
        for y, leaf in zip((ours, plain), leaves, strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["silu", "quick_gelu"])
def test_gradients_in_double_precision(activation):
    shapes = [(10, 8), (10, 8), (6, 10)] if activation == "silu" else [(10, 8), (6, 10)]
    made = layers_of(*shapes, dtype=torch.float64)
    x = randn(3, 8, dtype=torch.float64, device="cpu").requires_grad_()
    leaves = [x, *[t for layer in made for t in (layer.a, layer.b)]]

    def run(x, *_):
        torch.manual_seed(0)
        up = made[1] if len(made) == 3 else None
        return lora_mlp(x, made[0], up, made[-1], activation), *lora_qkv(x, made[:-1])

    assert torch.autograd.gradcheck(run, leaves)


def test_one_layer_with_and_one_without(device):
    with_, without = layers_of((6, 8), (6, 8), device=device, zero_base=True)
    without = LoRALinear(without.base, without.a, without.b, without.scaling)
    x = randn(5, 8, dtype=torch.float32, device=device).requires_grad_()
    dropped, whole = lora_qkv(x, [with_, without])
    torch.testing.assert_close(whole, lora_linear(x, without))
    assert not torch.equal(dropped, lora_linear(x, with_, training=False))
    dx, da = torch.autograd.grad(whole.sum(), (x, without.a))
    expected = torch.autograd.grad(lora_linear(x, without).sum(), (x, without.a))
    torch.testing.assert_close(dx, expected[0])
    torch.testing.assert_close(da, expected[1])


def test_recomputation_under_checkpointing_gives_the_same_gradients(device):
    (layer,) = layers_of((6, 8), device=device)
    x = randn(5, 8, dtype=torch.float32, device=device)
    grads = []
    for checkpointed in (False, True):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(lambda t: lora_linear(t, layer), leaf, use_reentrant=False)
        else:
            y = lora_linear(leaf, layer)
        grads.append(torch.autograd.grad(y.square().sum(), (leaf, layer.a, layer.b)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_compiles_as_one_graph(device):
    made = layers_of((6, 8), (6, 8), device=device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(lambda x: torch.cat(lora_qkv(x, made)), fullgraph=True, backend=backend)
    x = randn(5, 8, dtype=torch.float32, device=device).requires_grad_()
    torch.manual_seed(1)
    y = compiled(x)
    assert torch.autograd.grad(y.sum(), made[0].a)[0].any()
    assert not torch.equal(y, torch.cat(lora_qkv(x, made, training=False)))
