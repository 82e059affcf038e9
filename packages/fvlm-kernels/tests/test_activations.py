from __future__ import annotations

from functools import partial

import pytest
import torch

from fvlm_kernels import geglu, gelu, quick_gelu, swiglu
from fvlm_kernels.testing import (
    assert_deterministic,
    assert_same_rounding,
    check_against_reference,
    randn,
    run_with_gradients,
    strided,
    transposed,
)

PLAIN = {
    "gelu_erf": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}
GATED = {
    "swiglu": swiglu,
    "geglu_tanh": geglu,
    "geglu_erf": partial(geglu, approximate="none"),
}
OPS = PLAIN | GATED
SHAPES = [(2, 64), (3, 5, 40), (1, 1), (1, 8960), (7, 4304)]
every_op = pytest.mark.parametrize("op", OPS)


def inputs_of(op, shape, dtype, device, scale=2.0):
    tensors = {"x": randn(*shape, dtype=dtype, device=device, seed=1, scale=scale)}
    if op in GATED:
        tensors = {"gate": tensors["x"], "up": randn(*shape, dtype=dtype, device=device, seed=2)}
    return tensors


def pair(op):
    return partial(OPS[op], impl="triton"), partial(OPS[op], impl="torch")


@every_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy(op, shape, dtype, device):
    tensors = inputs_of(op, shape, dtype, device)
    check_against_reference(*pair(op), tensors, list(tensors))


@every_op
def test_policy_far_from_zero(op, dtype, device):
    tensors = inputs_of(op, (4, 500), dtype, device, scale=20.0)
    check_against_reference(*pair(op), tensors, list(tensors))


@every_op
@pytest.mark.parametrize("layout", [strided, transposed])
def test_policy_where_not_contiguous(op, layout, dtype, device):
    tensors = inputs_of(op, (5, 70), dtype, device)
    first = next(iter(tensors))
    tensors[first] = layout(tensors[first])
    check_against_reference(*pair(op), tensors, list(tensors))


@pytest.mark.parametrize("op", GATED)
def test_policy_on_the_halves_of_a_fused_projection(op, device):
    both = randn(3, 2, 2 * 2100, dtype=torch.float32, device=device)
    tensors = dict(zip(("gate", "up"), both.chunk(2, dim=-1), strict=True))
    check_against_reference(*pair(op), tensors, ["gate", "up"])


@pytest.mark.parametrize("op", GATED)
@pytest.mark.parametrize("wanted", ["gate", "up"])
def test_policy_with_one_input_frozen(op, wanted, device):
    tensors = inputs_of(op, (5, 70), torch.float32, device)
    check_against_reference(*pair(op), tensors, [wanted])


@every_op
def test_rounds_where_the_reference_rounds(op, device):
    low = torch.bfloat16 if device.type == "cuda" else torch.float16
    tensors = inputs_of(op, (9, 320), low, device, scale=1.0)  # far below zero PyTorch's GELU cancels, ours does not
    ours, reference = pair(op)
    assert_same_rounding(ours(**tensors), reference(**tensors))


@every_op
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy under the interpreter; σ is right at 0
def test_limits(op, device):
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], device=device)
    tensors = {"x": x} if op in PLAIN else {"gate": x, "up": torch.ones_like(x)}
    (y,), grads = run_with_gradients(pair(op)[0], tensors, list(tensors), [torch.ones_like(x)])
    torch.testing.assert_close(y, x.clamp(min=0), rtol=1e-5, atol=1e-6)
    slope = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=device)
    torch.testing.assert_close(next(iter(grads.values())), slope, rtol=1e-5, atol=1e-6)


def test_gelu_keeps_its_digits_far_below_zero(device):
    """At −5 x Φ(x) and its slope are about 1e-6: PyTorch's fp32 form has lost all digits there, ours keeps five."""
    x = torch.linspace(-6, 6, 1201, dtype=torch.float32, device=device)
    (y,), grads = run_with_gradients(partial(gelu, impl="triton"), {"x": x}, ["x"], [torch.ones_like(x)])
    wide = x.double()
    share = 0.5 * torch.special.erfc(-wide / 2**0.5)
    slope = share + wide * torch.exp(-0.5 * wide**2) / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(y.double(), wide * share, rtol=1e-5, atol=0)
    low = x < -3
    torch.testing.assert_close(grads["x"].double()[low], slope[low], rtol=1e-4, atol=0)


@every_op
def test_saves_the_inputs_alone(op, device):
    tensors = {n: t.requires_grad_() for n, t in inputs_of(op, (4, 64), torch.float32, device).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        pair(op)[0](**tensors)
    assert sorted(saved) == sorted(t.data_ptr() for t in tensors.values())


@every_op
def test_empty(op, device):
    tensors = inputs_of(op, (0, 64), torch.float32, device)
    (y,), grads = run_with_gradients(pair(op)[0], tensors, list(tensors))
    assert y.shape == (0, 64)
    assert all(g.shape == (0, 64) for g in grads.values())


@every_op
def test_two_runs_give_the_same_bits(op, device):
    tensors = inputs_of(op, (3, 1100), torch.float32, device)
    assert_deterministic(pair(op)[0], tensors, list(tensors))


@every_op
def test_compiles_as_one_graph(op, device):
    tensors = inputs_of(op, (3, 40), torch.float32, device)
    ours = pair(op)[0]

    def layer(**inputs):
        return ours(**{n: t * 2 for n, t in inputs.items()}) + 1

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    eager, fused = (run_with_gradients(f, tensors, list(tensors)) for f in (layer, compiled))
    for a, b in zip([*eager[0], *eager[1].values()], [*fused[0], *fused[1].values()], strict=True):
        torch.testing.assert_close(a, b)


def test_operators_pass_opcheck(device):
    x, up = inputs_of("swiglu", (3, 40), torch.float32, device).values()
    for act in ("gelu_erf", "quick_gelu"):
        torch.library.opcheck(torch.ops.fvlm.activation_fwd.default, (x, act))
        torch.library.opcheck(torch.ops.fvlm.activation_bwd.default, (up, x, act))
        torch.library.opcheck(torch.ops.fvlm.activation_bwd_.default, (up.clone(), x, act))
    torch.library.opcheck(torch.ops.fvlm.gated_fwd.default, (x, up, "silu"))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.fvlm.gated_bwd.default, (x, x, up, "silu", *needs))
    torch.library.opcheck(torch.ops.fvlm.gated_bwd_.default, (x.clone(), x, up, "silu"))


def test_exports(device):
    class Gate(torch.nn.Module):
        def forward(self, gate, up):
            return gelu(swiglu(gate, up, impl="triton"), impl="triton")

    tensors = tuple(inputs_of("swiglu", (3, 40), torch.float32, device).values())
    program = torch.export.export(Gate(), tensors)
    assert torch.equal(program.module()(*tensors), Gate()(*tensors))


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    x = torch.empty(2**31 + 4099, dtype=torch.bfloat16, device="cuda").normal_()
    assert torch.equal(gelu(x)[-5:], gelu(x[-5:].clone()))
    leaf, few = x.requires_grad_(), x[-5:].detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(gelu(leaf), leaf, torch.ones_like(x))
    assert torch.equal(grad[-5:], torch.autograd.grad(gelu(few), few, torch.ones_like(few))[0])


@pytest.mark.gpu
def test_gated_addresses_beyond_two_to_the_31():
    gate, up = (torch.empty(2**31 + 4099, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    few = [x[-5:].clone().requires_grad_() for x in (gate, up)]
    expected = swiglu(*few)
    wanted = torch.autograd.grad(expected, few, torch.ones_like(expected))
    y = swiglu(gate.requires_grad_(), up.requires_grad_())
    grads = torch.autograd.grad(y, (gate, up), torch.ones_like(y))
    assert torch.equal(y[-5:], expected)
    assert all(torch.equal(ours[-5:], theirs) for ours, theirs in zip(grads, wanted, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: gelu(x, approximate="sigmoid"), ValueError, "gelu: approximate is 'sigmoid'"),
        (lambda x: geglu(x, x, approximate="erf"), ValueError, "geglu: approximate is 'erf'"),
        (lambda x: swiglu(x, x[:, :4]), ValueError, r"up has shape \(3, 4\); it must have shape \(3, 8\)"),
        (lambda x: swiglu(x, x.half()), TypeError, "up has torch.float16 but gate has torch.float32"),
        (lambda x: quick_gelu(x.long()), TypeError, "quick_gelu: x has dtype torch.int64"),
        (lambda x: swiglu(x, x.to("meta")), ValueError, "up is on meta but gate on cpu"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call(torch.ones(3, 8))
    assert "\n" not in str(caught.value)


def test_gelu_of_infinity_is_pytorchs(device):
    """As `0.5 · x · (1 + erf(x / √2))` has it: an overflow in fp16 shows as what it is."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 60000.0, -60000.0], device=device)
    stock = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    assert stock.isinf().tolist() == [True, False, False, False, False]
    torch.testing.assert_close(gelu(x, impl="triton"), stock, equal_nan=True)
