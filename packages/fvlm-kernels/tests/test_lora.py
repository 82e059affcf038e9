from __future__ import annotations

import pytest
import torch

from fvlm_kernels import Int8Weight, LoRALinear, dequantize_int8, lora_linear, lora_mlp, lora_qkv, quantize_nf4
from fvlm_kernels.nf4 import dequantize_weight
from fvlm_kernels.testing import assert_deterministic, check_against_reference, randn, strided, transposed

KINDS = ["plain", "nf4", "int8"]
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
    "quick_gelu": lambda g: g * torch.sigmoid(1.702 * g),
}


class Zoo:
    """Layers as tensors by name, so that the error policy can differentiate them, and two ways to apply them."""

    def __init__(self, shapes, dtype, device, kind="nf4", rank=4, bias=True, scaling=0.5, lora_dtype=None, bare=()):
        self.kind, self.scaling, self.bare, self.bases, self.tensors = kind, scaling, bare, {}, {}
        for i, (name, (out_features, in_features)) in enumerate(shapes.items()):
            w = randn(out_features, in_features, dtype=dtype, device=device, seed=10 + i, scale=in_features**-0.5)
            self.bases[name] = self.quantized(w)
            if bias:
                self.tensors[f"{name}_bias"] = randn(out_features, dtype=dtype, device=device, seed=20 + i)
            if name not in bare:
                own = lora_dtype or dtype
                a = randn(rank + i, in_features, dtype=own, device=device, seed=30 + i, scale=in_features**-0.5)
                b = randn(out_features, rank + i, dtype=own, device=device, seed=40 + i, scale=0.5)
                self.tensors |= {f"{name}_a": a, f"{name}_b": b}

    def quantized(self, w):
        if self.kind == "nf4":
            return quantize_nf4(w, impl="torch")
        if self.kind == "int8":
            scale = w.abs().amax(1).float()
            return Int8Weight((w.float() * (127 / scale.unsqueeze(1))).round().to(torch.int8), scale, w.dtype)
        return w

    def weight(self, name, dtype):
        base = self.bases[name]
        if self.kind == "nf4":
            return dequantize_weight(base, torch.float32, impl="torch").to(dtype)
        if self.kind == "int8":
            return dequantize_int8(base.codes, base.scale, torch.float32, impl="torch").to(dtype)
        return base.to(dtype)

    def layer(self, name, tensors, dropout=0.0):
        parts = [tensors.get(f"{name}_{part}") for part in ("a", "b", "bias")]
        return LoRALinear(self.bases[name], parts[0], parts[1], self.scaling, parts[2], dropout)

    def plainly(self, name, x, tensors):
        """One layer as PEFT writes it."""
        y = torch.nn.functional.linear(x, self.weight(name, x.dtype), tensors.get(f"{name}_bias"))
        if name in self.bare:
            return y
        a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
        return (y + (x.to(a.dtype) @ a.t() @ b.t()) * self.scaling).to(y.dtype)

    def policy(self, ours, reference, x, wanted=None, **keywords):
        tensors = {"x": x, **self.tensors}
        check_against_reference(ours, reference, tensors, list(tensors) if wanted is None else wanted, **keywords)


QKV = {"q": (32, 64), "k": (16, 64), "v": (8, 64)}
MLP = {"gate": (32, 64), "up": (32, 64), "down": (24, 32)}


def qkv_pair(zoo, **keywords):
    def ours(x, **tensors):
        return lora_qkv(x, [zoo.layer(n, tensors) for n in zoo.bases], **keywords)

    def reference(x, **tensors):
        return tuple(zoo.plainly(n, x, tensors) for n in zoo.bases)

    return ours, reference


def mlp_pair(zoo, activation, **keywords):
    gated = "up" in zoo.bases

    def ours(x, **tensors):
        up = zoo.layer("up", tensors) if gated else None
        return lora_mlp(x, zoo.layer("gate", tensors), up, zoo.layer("down", tensors), activation, **keywords)

    def reference(x, **tensors):
        h = ACTIVATIONS[activation](zoo.plainly("gate", x, tensors))
        return zoo.plainly("down", h * zoo.plainly("up", x, tensors) if gated else h, tensors)

    return ours, reference


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_holds_the_policy(kind, impl, dtype, device):
    zoo = Zoo({"q": (48, 64)}, dtype, device, kind)
    x = randn(2, 5, 64, dtype=dtype, device=device)
    zoo.policy(lambda x, **t: lora_linear(x, zoo.layer("q", t), impl=impl), lambda x, **t: zoo.plainly("q", x, t), x)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_qkv_holds_the_policy(kind, impl, dtype, device):
    zoo = Zoo(QKV, dtype, device, kind)
    zoo.policy(*qkv_pair(zoo, impl=impl), randn(7, 64, dtype=dtype, device=device))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", KINDS)
def test_gated_mlp_holds_the_policy(kind, activation, dtype, device):
    zoo = Zoo(MLP, dtype, device, kind)
    x = randn(2, 3, 64, dtype=dtype, device=device)
    for impl in ("torch", "triton"):
        zoo.policy(*mlp_pair(zoo, activation, impl=impl), x)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_plain_mlp_holds_the_policy(activation, dtype, device):
    zoo = Zoo({n: MLP[n] for n in ("gate", "down")}, dtype, device)
    x = randn(6, 64, dtype=dtype, device=device)
    for impl in ("torch", "triton"):
        zoo.policy(*mlp_pair(zoo, activation, impl=impl), x)


@pytest.mark.parametrize("shape", [(1, 64), (3, 1, 64), (64,)], ids=str)
def test_single_rows(shape, device):
    x = randn(*shape, dtype=torch.float32, device=device)
    for zoo, pair in ((Zoo(QKV, torch.float32, device), qkv_pair), (Zoo(MLP, torch.float32, device), None)):
        ours, reference = pair(zoo) if pair else mlp_pair(zoo, "silu")
        zoo.policy(ours, reference, x)


def test_ragged_widths(device):
    zoo = Zoo({"q": (33, 50), "k": (7, 50)}, torch.float32, device, rank=3)
    zoo.policy(*qkv_pair(zoo), randn(9, 50, dtype=torch.float32, device=device))


def test_empty_input(device):
    qkv, mlp = Zoo(QKV, torch.float32, device), Zoo(MLP, torch.float32, device)
    x = torch.zeros(2, 0, 64, device=device, requires_grad=True)
    leaves = {n: t.clone().requires_grad_() for n, t in (qkv.tensors | mlp.tensors).items()}
    outputs = [*qkv_pair(qkv)[0](x, **leaves), mlp_pair(mlp, "silu")[0](x, **leaves)]
    assert [tuple(o.shape) for o in outputs] == [(2, 0, 32), (2, 0, 16), (2, 0, 8), (2, 0, 24)]
    grads = torch.autograd.grad(outputs, [x, *leaves.values()], [torch.zeros_like(o) for o in outputs])
    assert grads[0].shape == x.shape
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("layout", [strided, transposed])
def test_input_and_adapters_that_are_not_contiguous(layout, device):
    zoo = Zoo(QKV, torch.float32, device)
    zoo.tensors = {n: t if t.dim() == 1 else layout(t) for n, t in zoo.tensors.items()}
    zoo.policy(*qkv_pair(zoo), layout(randn(2, 6, 64, dtype=torch.float32, device=device)))


@pytest.mark.parametrize("wanted", [["x"], ["q_a"], ["k_b"], ["v_bias"], ["x", "k_a", "v_b"], ["q_a", "k_a", "v_a"]])
def test_only_what_is_asked_for_is_computed(wanted, device):
    zoo = Zoo(QKV, torch.float32, device)
    x = randn(7, 64, dtype=torch.float32, device=device)
    ours, reference = qkv_pair(zoo)
    zoo.policy(lambda **t: torch.cat(ours(**t), -1), lambda **t: torch.cat(reference(**t), -1), x, wanted)


@pytest.mark.parametrize("wanted", [["x"], ["down_a"], ["down_b", "down_bias"], ["gate_a"], ["up_b"], ["gate_bias"]])
def test_only_what_is_asked_for_is_computed_in_an_mlp(wanted, device):
    zoo = Zoo(MLP, torch.float32, device)
    zoo.policy(*mlp_pair(zoo, "silu"), randn(7, 64, dtype=torch.float32, device=device), wanted)


def kept_bytes(zoo, x, run):
    """The sizes of what a forward pass saves, but for its inputs and the zoo's own tensors."""
    seen, own = {}, [x, *zoo.tensors.values(), *(p for base in zoo.bases.values() for p in base.parts)]

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sorted(v for k, v in seen.items() if k not in {t.untyped_storage().data_ptr() for t in own})


def test_frozen_adapters_save_no_activation(device):
    zoo = Zoo(MLP, torch.float32, device, bias=False)
    x = randn(100, 64, dtype=torch.float32, device=device)
    zoo.tensors["down_b"].requires_grad_()
    kept = kept_bytes(zoo, torch.empty(0), lambda: mlp_pair(zoo, "silu")[0](x, **zoo.tensors))
    assert kept == [100 * 6 * 4]  # the product with down's A, of rank 6, and nothing else


@pytest.mark.parametrize(("trained", "size"), [("q_a", [100 * 64 * 4]), ("k_b", [100 * 15 * 4]), ("q_bias", [])])
def test_projections_save_only_what_is_trained_on(trained, size, device):
    zoo = Zoo(QKV, torch.float32, device)
    x = randn(100, 64, dtype=torch.float32, device=device)
    zoo.tensors[trained].requires_grad_()
    kept = kept_bytes(zoo, torch.empty(0), lambda: qkv_pair(zoo)[0](x, **zoo.tensors))
    assert kept == size  # x; or the products with A, of ranks 4, 5 and 6; or nothing


def test_hidden_activation_of_an_mlp_is_not_saved(device):
    zoo = Zoo(MLP, torch.float32, device, bias=False)
    x = randn(100, 64, dtype=torch.float32, device=device).requires_grad_()
    tensors = {n: t.requires_grad_() for n, t in zoo.tensors.items()}
    kept = kept_bytes(zoo, x, lambda: mlp_pair(zoo, "silu")[0](x, **tensors))
    # the products with down's A and with those of gate and up; gate; up
    assert kept == [100 * 6 * 4, 100 * 9 * 4, 100 * 32 * 4, 100 * 32 * 4]


@pytest.mark.parametrize("bare", [("q",), ("k", "v"), ("q", "k", "v")], ids=str)
def test_layers_without_an_adapter(bare, device):
    zoo = Zoo(QKV, torch.float32, device, bare=bare)
    zoo.policy(*qkv_pair(zoo), randn(7, 64, dtype=torch.float32, device=device))


def test_adapters_in_fp32_beside_an_input_in_half_precision(device):
    zoo = Zoo(QKV, torch.float16, device, lora_dtype=torch.float32)
    zoo.policy(*qkv_pair(zoo), randn(7, 64, dtype=torch.float16, device=device))
    mlp = Zoo(MLP, torch.float16, device, lora_dtype=torch.float32)
    mlp.policy(*mlp_pair(mlp, "silu"), randn(7, 64, dtype=torch.float16, device=device))


def test_unused_output_gets_no_gradient(device):
    zoo = Zoo(QKV, torch.float32, device)
    leaves = {n: t.clone().requires_grad_() for n, t in zoo.tensors.items()}
    x = randn(7, 64, dtype=torch.float32, device=device)
    q, _, _ = qkv_pair(zoo)[0](x, **leaves)
    q.sum().backward()
    assert leaves["q_a"].grad.any()
    assert not leaves["k_a"].grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_double_precision(kind):
    zoo = Zoo({"gate": (12, 8), "up": (12, 8), "down": (6, 12)}, torch.float32, "cpu", kind, rank=2)
    names = list(zoo.tensors)
    leaves = [randn(3, 8, dtype=torch.float64, device="cpu").requires_grad_()]
    leaves += [zoo.tensors[n].double().requires_grad_() for n in names]

    def run(x, *rest):
        tensors = dict(zip(names, rest, strict=True))
        y = mlp_pair(zoo, "gelu")[0](x, **tensors)
        return y, *lora_qkv(x, [zoo.layer("gate", tensors), zoo.layer("up", tensors)])

    assert torch.autograd.gradcheck(run, leaves)


def test_two_runs_give_the_same_bits(device):
    zoo = Zoo(MLP, torch.float32, device)
    tensors = {"x": randn(50, 64, dtype=torch.float32, device=device), **zoo.tensors}
    assert_deterministic(mlp_pair(zoo, "silu")[0], tensors, list(tensors))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_as_one_graph(impl, device):
    qkv, mlp = Zoo(QKV, torch.float32, device), Zoo(MLP, torch.float32, device)
    project, block = qkv_pair(qkv, impl=impl)[0], mlp_pair(mlp, "silu", impl=impl)[0]
    leaves = {n: t.clone().requires_grad_() for n, t in (qkv.tensors | mlp.tensors).items()}

    def layer(x, tensors):
        q, k, v = project(x, **tensors)
        return block(x * 2, **tensors).sum() + q.square().sum() + k.sum() + v.sum()

    x = randn(6, 64, dtype=torch.float32, device=device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    grads = []
    for fn in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(leaf, leaves), [leaf, *leaves.values()]))
    for eager, fused in zip(*grads, strict=True):
        torch.testing.assert_close(eager, fused)


def test_autocast_computes_in_its_dtype(device):
    low = torch.bfloat16
    for kind in ("plain", "nf4"):
        zoo = Zoo(QKV, torch.float32, device, kind)
        x = randn(7, 64, dtype=torch.float32, device=device)
        leaves = {n: t.clone().requires_grad_() for n, t in zoo.tensors.items()}
        with torch.autocast(device.type, dtype=low):
            ours = qkv_pair(zoo)[0](x, **leaves)
        assert {y.dtype for y in ours} == {low if kind == "plain" else torch.float32}
        ours[0].float().square().sum().backward()
        assert leaves["q_a"].grad.dtype == torch.float32
        for name, y in zip(zoo.bases, ours, strict=True):
            inner = {n: t.to(low) for n, t in leaves.items()}
            expected = zoo.plainly(name, x.to(low), inner)
            torch.testing.assert_close(y.float(), expected.float(), rtol=0.02, atol=0.02)
        with torch.autocast(device.type, dtype=low):  # asked for, fp32 stays fp32 under autocast, forward and backward
            exact = qkv_pair(zoo, compute_dtype=torch.float32, lora_dtype=torch.float32)[0](x, **leaves)[0].float()
            (grad,) = torch.autograd.grad(exact.sum(), leaves["q_a"])
        plain = zoo.plainly("q", x, leaves)
        (expected,) = torch.autograd.grad(plain.sum(), leaves["q_a"])
        torch.testing.assert_close(grad, expected)
