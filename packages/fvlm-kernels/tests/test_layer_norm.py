from __future__ import annotations

from functools import partial

import pytest
import torch

from fvlm_kernels import layer_norm
from fvlm_kernels.testing import (
    assert_deterministic,
    assert_same_rounding,
    check_against_reference,
    poisoned_memory,
    randn,
    run_with_gradients,
    strided,
    transposed,
)

ours = partial(layer_norm, impl="triton")
reference = partial(layer_norm, impl="torch")
SHAPES = [(8, 64), (5, 100), (1, 3), (2, 1280), (7, 2100), (2, 3, 80), (70, 64)]


def inputs_of(shape, dtype, device, bias=True, residual=False, weight_dtype=None):
    wide = weight_dtype or dtype
    tensors = {
        "x": randn(*shape, dtype=dtype, device=device, seed=1, scale=2.0) + 3,
        "weight": randn(shape[-1], dtype=wide, device=device, seed=2),
    }
    if bias:
        tensors["bias"] = randn(shape[-1], dtype=wide, device=device, seed=4)
    if residual:
        tensors["residual"] = randn(*shape, dtype=dtype, device=device, seed=3)
    return tensors


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy(shape, dtype, device, bias):
    tensors = inputs_of(shape, dtype, device, bias)
    check_against_reference(ours, reference, tensors, list(tensors))


@pytest.mark.parametrize("unused", [(), (0,), (1,)], ids=["both outputs used", "only h used", "only y used"])
def test_policy_with_residual(dtype, device, unused):
    tensors = inputs_of((5, 100), dtype, device, residual=True)
    wanted = ["x", "residual"] if unused == (0,) else list(tensors)
    check_against_reference(ours, reference, tensors, wanted, unused=unused)


@pytest.mark.parametrize("layout", [strided, transposed])
def test_policy_where_not_contiguous(dtype, device, layout):
    tensors = inputs_of((6, 48), dtype, device, residual=True)
    tensors |= {n: layout(tensors[n]) for n in ("x", "residual")}
    tensors |= {n: tensors[n].repeat_interleave(2)[::2] for n in ("weight", "bias")}
    check_against_reference(ours, reference, tensors, list(tensors))


def test_policy_with_fp32_weight(device):
    tensors = inputs_of((5, 100), torch.float16, device, weight_dtype=torch.float32)
    check_against_reference(ours, reference, tensors, list(tensors))


@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["bias"], ["x", "bias"], ["x", "weight"]], ids="+".join)
def test_policy_with_some_inputs_frozen(device, wanted):
    tensors = inputs_of((7, 2100), torch.float32, device)
    check_against_reference(ours, reference, tensors, wanted)


def test_rounds_where_the_reference_rounds(device):
    low = torch.bfloat16 if device.type == "cuda" else torch.float16
    tensors = inputs_of((9, 320), low, device, residual=True)
    for a, b in zip(ours(**tensors), reference(**tensors), strict=True):
        assert_same_rounding(a, b)


def test_variance_survives_a_large_mean(device):
    x = randn(4, 100, dtype=torch.float32, device=device) + 1e4
    one = torch.ones(100, device=device)
    exact = torch.nn.functional.layer_norm(x.double(), (100,))
    assert (ours(x, one).double() - exact).abs().max() < 1e-2


def test_eps_decides_where_a_row_is_constant(device):
    x = torch.full((2, 8), 5.0, device=device, requires_grad=True)
    y = ours(x, torch.ones(8, device=device), eps=0.25)
    (dx,) = torch.autograd.grad(y, x, torch.eye(2, 8, device=device))
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.allclose(dx[0, :2], torch.tensor([1.75, -0.25], device=device))  # (1 − 1/8) / sqrt(eps)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_empty(shape, device):
    tensors = inputs_of(shape, torch.float32, device, residual=True)
    with poisoned_memory():
        (y, h), grads = run_with_gradients(ours, tensors, ["x", "weight", "bias"])
    assert y.shape == h.shape == grads["x"].shape == shape
    assert not grads["weight"].any()
    assert not grads["bias"].any()


def test_frozen_weight_gets_no_gradient(device):
    tensors = inputs_of((5, 100), torch.float32, device)
    x = tensors.pop("x").requires_grad_()
    ours(x, **tensors).sum().backward()
    assert tensors["weight"].grad is None
    assert tensors["bias"].grad is None


def test_two_runs_give_the_same_bits(device):
    tensors = inputs_of((70, 64), torch.float32, device, residual=True)
    assert_deterministic(ours, tensors, list(tensors))


def test_a_row_does_not_depend_on_its_batch(device):
    tensors = inputs_of((70, 96), torch.float16, device)
    alone = ours(tensors["x"][13:14], tensors["weight"], tensors["bias"])
    assert torch.equal(ours(**tensors)[13:14], alone)


def test_operators_pass_opcheck(device):
    x, weight, bias, residual = inputs_of((3, 40), torch.float32, device, residual=True).values()
    for shift in (bias, None):
        torch.library.opcheck(torch.ops.fvlm.layer_norm_fwd.default, (x, weight, shift, 1e-6, torch.float16))
    torch.library.opcheck(torch.ops.fvlm.add_layer_norm_fwd.default, (x, residual, weight, bias, 1e-6, torch.float32))
    for dh, need_dweight, need_dbias in [(None, False, False), (residual, True, True), (None, False, True)]:
        arguments = (x, dh, x, weight, 1e-6, need_dweight, need_dbias, torch.float16)
        torch.library.opcheck(torch.ops.fvlm.layer_norm_bwd.default, arguments)


def test_compiles_as_one_graph(device):
    tensors = inputs_of((6, 48), torch.float32, device, residual=True)

    def layer(x, weight, bias, residual):
        y, h = ours(x, weight, bias, residual=residual)
        return ours(y, weight) * 2, h

    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    eager, fused = (run_with_gradients(f, tensors, list(tensors)) for f in (layer, compiled))
    for a, b in zip([*eager[0], *eager[1].values()], [*fused[0], *fused[1].values()], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_autocast_gives_what_pytorch_gives(device):
    tensors = inputs_of((5, 100), torch.bfloat16, device, weight_dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = ours(**tensors)
        low = torch.nn.functional.layer_norm(tensors["x"], (100,), tensors["weight"], tensors["bias"])
    assert y.dtype == low.dtype == torch.float32
    torch.testing.assert_close(y, low)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    rows, width = 2**19 + 3, 4096
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight, bias = (torch.randn(width, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(2))
    y = ours(x, weight, bias)
    last = x[-5:].detach().clone().requires_grad_()
    few = ours(last, weight, bias)
    assert torch.equal(y[-5:], few)
    grad, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    total = torch.zeros(width, device="cuda")
    for part in x.detach().split(2**16):
        total += torch.nn.functional.layer_norm(part.float(), (width,)).sum(0)
    assert torch.equal(grad[-5:], torch.autograd.grad(few, last, torch.ones_like(few))[0])
    torch.testing.assert_close(dweight.float(), total, rtol=1e-2, atol=2.0)  # of a deviation of some 700
    assert (dbias.float() - rows).abs().max() <= rows / 256


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); it must have shape \(8,\)"),
        ({"bias": torch.ones(1)}, ValueError, r"bias has shape \(1,\)"),
        ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, "bias has dtype torch.int32"),
        ({"residual": torch.ones(2, 8)}, ValueError, "residual has shape"),
        ({"residual": torch.ones(3, 8, dtype=torch.float16)}, TypeError, "residual has torch.float16"),
        ({"x": torch.ones(3, 0), "weight": torch.ones(0)}, ValueError, "last dimension"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta but x on cpu"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, words):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(8), "impl": "torch", **change}
    with pytest.raises(error, match=words) as caught:
        layer_norm(**arguments)
    assert "\n" not in str(caught.value)
