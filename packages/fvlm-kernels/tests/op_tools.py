"""One call of every op on small inputs: what the tests of all ops are run over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import fvlm_kernels as ops
from fvlm_kernels import Int8Weight, LoRALinear, quantize_nf4
from fvlm_kernels.testing import randn

LABELS = torch.tensor([3, -100, 7, 0, -100, 11])
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
NF4 = ("packed", "absmax", "nested_absmax", "code", "offset")


@dataclass(frozen=True)
class Op:
    """One op on small inputs.

    Attributes:
        call: of the tensors by name, and of `impl` where the op has a choice.
        shapes: the floating inputs that are drawn at random, with their shapes.
        fixed: further tensors.
        frozen: floating inputs that get no gradient.
        impl: the choice under test, None for an op without one.
        in_place: whether it changes its inputs and returns nothing.
    """

    call: Any
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    impl: str | None = "triton"
    in_place: bool = False


def nf4_parts(n, k, seed=0):
    weight = quantize_nf4(randn(n, k, dtype=torch.float32, device="cpu", seed=seed) * k**-0.5, impl="torch")
    return dict(zip(NF4, weight.parts, strict=True))


def weight_from(tensors, n, k):
    return ops.NF4Weight(
        tensors["packed"], tensors["absmax"], (n, k), torch.float32, 64, *(tensors[p] for p in NF4[2:])
    )


def adapted(t, name, base):
    return LoRALinear(base, t[f"{name}_a"], t[f"{name}_b"], 0.5)


def lora_mlp(impl, x, eight, eight_scale, plain, a_a, a_b, b_a, b_b, c_a, c_b, **parts):
    t = {"a_a": a_a, "a_b": a_b, "b_a": b_a, "b_b": b_b, "c_a": c_a, "c_b": c_b}
    gate, up = (
        adapted(t, "a", weight_from(parts, 48, 64)),
        adapted(t, "b", Int8Weight(eight, eight_scale, torch.float32)),
    )
    return ops.lora_mlp(x, gate, up, adapted(t, "c", plain), impl=impl)


def adamw(impl, param, grad, exp_avg, exp_avg_sq, step):
    moments = exp_avg, exp_avg_sq.abs()
    ops.adamw_flat_(param, grad, *moments, step, lr=0.1, grad_norm=grad.norm(), max_norm=1.0, impl=impl)
    return param, *moments


def decode_attention(impl, q, keys, values, length):
    return ops.decode_attention(q, keys, values, length, impl=impl)


ROTARY = {"q": (2, 3, 5, 8), "k": (2, 1, 5, 8)}
ADAPTER = {"a_a": (4, 64), "a_b": (48, 4)}
DEQUANTIZED = dict.fromkeys(NF4)
OPS = {
    "rms_norm": Op(
        lambda impl, x, w, r: ops.rms_norm(x, w, residual=r, impl=impl), {"x": (9, 40), "w": (40,), "r": (9, 40)}
    ),
    "layer_norm": Op(
        lambda impl, x, w, b, r: ops.layer_norm(x, w, b, residual=r, impl=impl),
        {"x": (9, 40), "w": (40,), "b": (40,), "r": (9, 40)},
    ),
    "gelu": Op(lambda impl, x: ops.gelu(x, impl=impl), {"x": (3, 40)}),
    "quick_gelu": Op(lambda impl, x: ops.quick_gelu(x, impl=impl), {"x": (3, 40)}),
    "swiglu": Op(lambda impl, g, u: ops.swiglu(g, u, impl=impl), {"g": (3, 40), "u": (3, 40)}),
    "geglu": Op(lambda impl, g, u: ops.geglu(g, u, impl=impl), {"g": (3, 40), "u": (3, 40)}),
    "rotary": Op(
        lambda impl, **t: ops.rotary(**t, impl=impl), ROTARY | {"cos": (5, 8), "sin": (5, 8)}, frozen=("cos", "sin")
    ),
    "multimodal_rotary": Op(
        lambda impl, **t: ops.multimodal_rotary(**t, sections=(1, 1, 2), impl=impl),
        ROTARY | {"cos": (3, 2, 5, 8), "sin": (3, 2, 5, 8)},
        frozen=("cos", "sin"),
    ),
    "vision_rotary": Op(
        lambda impl, **t: ops.vision_rotary(**t, impl=impl),
        {"q": (5, 2, 8), "k": (5, 2, 8), "cos": (5, 8), "sin": (5, 8)},
        frozen=("cos", "sin"),
    ),
    "packed_vision_rotary": Op(
        lambda impl, **t: ops.packed_vision_rotary(**t, impl=impl),
        {"qkv": (5, 3, 2, 8), "cos": (5, 8), "sin": (5, 8)},
        frozen=("cos", "sin"),
    ),
    "cross_entropy": Op(
        lambda impl, x, labels: ops.cross_entropy(x, labels, softcap=5.0, z_loss=0.1, impl=impl),
        {"x": (6, 20)},
        {"labels": LABELS},
    ),
    "linear_cross_entropy": Op(
        lambda impl, h, w, b, labels: ops.linear_cross_entropy(h, w, labels, b, impl=impl),
        {"h": (6, 8), "w": (20, 8), "b": (20,)},
        {"labels": LABELS},
    ),
    "quantize_nf4": Op(lambda impl, x: quantize_nf4(x, impl=impl).parts, {"x": (5, 72)}, frozen=("x",)),
    "dequantize_nf4": Op(
        lambda impl, **t: ops.dequantize_nf4(**t, shape=(5, 72), dtype=torch.float32, impl=impl), {}, nf4_parts(5, 72)
    ),
    "nf4_matvec": Op(
        lambda impl, x, **t: ops.nf4_matvec(x, **t, shape=(16, 64), impl=impl),
        {"x": (2, 64)},
        nf4_parts(16, 64),
        frozen=("x",),
    ),
    "dequantize_int8": Op(
        lambda impl, codes, scale: ops.dequantize_int8(codes, scale, torch.float32, impl=impl),
        {"scale": (4,)},
        {"codes": torch.arange(-20, 20, dtype=torch.int8).view(4, 10)},
        frozen=("scale",),
    ),
    "lora_linear": Op(
        lambda impl, x, a_a, a_b, **t: ops.lora_linear(
            x, adapted({"a_a": a_a, "a_b": a_b}, "a", weight_from(t, 48, 64)), impl=impl
        ),
        {"x": (3, 64)} | ADAPTER,
        nf4_parts(48, 64),
    ),
    "lora_qkv": Op(
        lambda impl, x, a_a, a_b, b_a, b_b, w, **t: ops.lora_qkv(
            x,
            [
                adapted({"a_a": a_a, "a_b": a_b}, "a", weight_from(t, 48, 64)),
                adapted({"b_a": b_a, "b_b": b_b}, "b", w),
            ],
            impl=impl,
        ),
        {"x": (3, 64), "w": (10, 64)} | ADAPTER | {"b_a": (2, 64), "b_b": (10, 2)},
        nf4_parts(48, 64),
        frozen=("w",),
    ),
    "lora_mlp": Op(
        lora_mlp,
        {"x": (3, 64), "plain": (64, 48), "eight_scale": (48,)}
        | ADAPTER
        | {"b_a": (4, 64), "b_b": (48, 4), "c_a": (4, 48), "c_b": (64, 4)},
        nf4_parts(48, 64) | {"eight": torch.arange(48 * 64).remainder(200).sub(100).to(torch.int8).view(48, 64)},
        frozen=("plain", "eight_scale"),
    ),
    "lora_decode": Op(
        lambda impl, x, a_a, a_b, **t: ops.lora_decode(
            x, [adapted({"a_a": a_a, "a_b": a_b}, "a", weight_from(t, 48, 64))], impl=impl
        ),
        {"x": (1, 64)} | ADAPTER,
        nf4_parts(48, 64),
        frozen=("x", "a_a", "a_b"),
    ),
    "lora_decode_gated": Op(
        lambda impl, x, a_a, a_b, **t: ops.lora_decode_gated(
            x, *[adapted({"a_a": a_a, "a_b": a_b}, "a", weight_from(t, 48, 64)) for _ in range(2)], impl=impl
        ),
        {"x": (1, 64)} | ADAPTER,
        nf4_parts(48, 64),
        frozen=("x", "a_a", "a_b"),
    ),
    "decode_attention": Op(
        decode_attention,
        {"q": (2, 4, 16), "keys": (2, 2, 24, 16), "values": (2, 2, 24, 16)},
        {"length": torch.tensor(19)},
        frozen=("q", "keys", "values"),
    ),
    "varlen_attention": Op(
        lambda impl, q, k, v, cu: ops.varlen_attention(q, k, v, cu, 4, causal=True, impl=impl),
        {"q": (6, 4, 16), "k": (6, 2, 16), "v": (6, 2, 16)},
        {"cu": CU},
        impl="torch",  # flash adds up the queries' gradient in no fixed order; it has tests of its own
    ),
    "patch_embed": Op(
        lambda impl, x, w, b: ops.patch_embed(x, w, b), {"x": (2, 3, 8, 8), "w": (5, 3, 4, 4), "b": (5,)}, impl=None
    ),
    "adamw_flat_": Op(
        adamw,
        dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), (50,)),
        {"step": torch.tensor(3.0)},
        frozen=("param", "grad", "exp_avg", "exp_avg_sq"),
        in_place=True,
    ),
}
ELSEWHERE = {"attention_with_residuals", "attention_from_residuals"}  # halves of one op: test_attention_residuals.py
READS_ON_THE_HOST = {"varlen_attention"}  # its reference reads the lengths; flash does not, and is tested in one graph


def inputs_of(op, device, dtype=torch.float32):
    drawn = {
        n: randn(*shape, dtype=dtype, device=device, seed=i, scale=0.5)
        for i, (n, shape) in enumerate(op.shapes.items())
    }
    return drawn | {n: t.to(device) for n, t in op.fixed.items()}


def wanted_of(op):
    return [n for n in op.shapes if n not in op.frozen]


def called(op, impl, tensors):
    """Call with the op's inputs, on copies where it changes them."""
    given = {n: t.clone() for n, t in tensors.items()} if op.in_place else tensors
    return op.call(impl, **given)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)
