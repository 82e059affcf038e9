from __future__ import annotations

from functools import partial

import pytest
import torch

from fvlm_kernels import rms_norm
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

ours = partial(rms_norm, impl="triton")
reference = partial(rms_norm, impl="torch")
SHAPES = [(8, 64), (5, 100), (1, 1), (2, 1536), (7, 3584), (2, 3, 80), (70, 64)]
MODES = [("llama", 0.0), ("gemma", 1.0)]


def inputs_of(shape, dtype, device, residual=False, weight_dtype=None):
    tensors = {
        "x": randn(*shape, dtype=dtype, device=device, seed=1, scale=2.0),
        "weight": randn(shape[-1], dtype=weight_dtype or dtype, device=device, seed=2),
    }
    if residual:
        tensors["residual"] = randn(*shape, dtype=dtype, device=device, seed=3)
    return tensors


@pytest.mark.parametrize(("rounding", "offset"), MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy(shape, dtype, device, rounding, offset):
    keywords = {"rounding": rounding, "offset": offset, "eps": 1e-5}
    tensors = inputs_of(shape, dtype, device)
    check_against_reference(partial(ours, **keywords), partial(reference, **keywords), tensors, ["x", "weight"])


@pytest.mark.parametrize(("rounding", "offset"), MODES)
@pytest.mark.parametrize("unused", [(), (0,), (1,)], ids=["both outputs used", "only h used", "only y used"])
def test_policy_with_residual(dtype, device, rounding, offset, unused):
    keywords = {"rounding": rounding, "offset": offset}
    tensors = inputs_of((5, 100), dtype, device, residual=True)
    wanted = ["x", "residual"] if unused == (0,) else ["x", "residual", "weight"]
    check_against_reference(partial(ours, **keywords), partial(reference, **keywords), tensors, wanted, unused=unused)


@pytest.mark.parametrize("layout", [strided, transposed])
def test_policy_where_not_contiguous(dtype, device, layout):
    tensors = {n: t if n == "weight" else layout(t) for n, t in inputs_of((6, 48), dtype, device, True).items()}
    tensors["weight"] = tensors["weight"].repeat_interleave(2)[::2]
    check_against_reference(ours, reference, tensors, ["x", "weight", "residual"])


@pytest.mark.parametrize("rounding", ["llama", "gemma"])
def test_policy_with_fp32_weight(device, rounding):
    tensors = inputs_of((5, 100), torch.float16, device, weight_dtype=torch.float32)
    check_against_reference(
        partial(ours, rounding=rounding), partial(reference, rounding=rounding), tensors, ["x", "weight"]
    )


def test_offset_is_added_to_the_weight_before_a_llama_rounding_too(dtype, device):
    keywords = {"offset": 0.5}
    tensors = inputs_of((5, 100), dtype, device)
    check_against_reference(partial(ours, **keywords), partial(reference, **keywords), tensors, ["x", "weight"])


@pytest.mark.parametrize(("rounding", "offset"), [*MODES, ("llama", 0.3)])
def test_rounds_where_the_reference_rounds(device, rounding, offset):
    low = torch.bfloat16 if device.type == "cuda" else torch.float16
    tensors = inputs_of((9, 320), low, device, residual=True)
    keywords = {"rounding": rounding, "offset": offset}
    for a, b in zip(ours(**tensors, **keywords), reference(**tensors, **keywords), strict=True):
        assert_same_rounding(a, b)


def test_eps_decides_where_a_row_is_zero(device):
    x = torch.zeros(2, 8, device=device, requires_grad=True)
    y = ours(x, torch.ones(8, device=device), eps=0.25)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.allclose(dx, torch.full_like(dx, 2.0))  # rstd = 1/sqrt(0.25)


def test_large_fp16_values_do_not_overflow(device):
    x = torch.full((2, 100), 6e4, dtype=torch.float16, device=device)
    assert torch.allclose(ours(x, torch.ones(100, dtype=torch.float16, device=device)), torch.ones_like(x), atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_empty(shape, device):
    tensors = inputs_of(shape, torch.float32, device, residual=True)
    with poisoned_memory():
        (y, h), grads = run_with_gradients(ours, tensors, ["x", "weight"])
    assert y.shape == h.shape == grads["x"].shape == shape
    assert torch.equal(grads["weight"], torch.zeros_like(grads["weight"]))


def test_frozen_weight_gets_no_gradient(device):
    tensors = inputs_of((5, 100), torch.float32, device)
    check_against_reference(ours, reference, tensors, ["x"])
    x = tensors["x"].clone().requires_grad_()
    weight = tensors["weight"].clone()
    ours(x, weight).sum().backward()
    assert weight.grad is None
    with torch.no_grad():
        assert not ours(x, weight).requires_grad


def test_two_runs_give_the_same_bits(device):
    assert_deterministic(ours, inputs_of((70, 64), torch.float32, device, residual=True), ["x", "weight", "residual"])


def test_a_row_does_not_depend_on_its_batch(device):
    tensors = inputs_of((70, 96), torch.float16, device)
    assert torch.equal(ours(**tensors)[13:14], ours(tensors["x"][13:14], tensors["weight"]))


def test_operators_pass_opcheck(device):
    x, weight, residual = inputs_of((3, 40), torch.float32, device, residual=True).values()
    settings = (1e-6, 0.0, True)
    torch.library.opcheck(torch.ops.fvlm.rms_norm_fwd.default, (x, weight, *settings))
    torch.library.opcheck(torch.ops.fvlm.add_rms_norm_fwd.default, (x, residual, weight, *settings))
    for need_dweight in (True, False):
        for dh in (None, residual):
            torch.library.opcheck(torch.ops.fvlm.rms_norm_bwd.default, (x, dh, x, weight, *settings, need_dweight))


def test_compiles_as_one_graph(device):
    tensors = inputs_of((6, 48), torch.float32, device, residual=True)

    def layer(x, weight, residual):
        y, h = ours(x, weight, residual=residual)
        return ours(y, weight) * 2, h

    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    eager, fused = (run_with_gradients(f, tensors, ["x", "weight", "residual"]) for f in (layer, compiled))
    for a, b in zip([*eager[0], *eager[1].values()], [*fused[0], *fused[1].values()], strict=True):
        torch.testing.assert_close(a, b)


def test_exports(device):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(48, device=device))

        def forward(self, x):
            return ours(x, self.weight)

    x = randn(6, 48, dtype=torch.float32, device=device)
    module = Norm()
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=64)}})
    taller = randn(9, 48, dtype=torch.float32, device=device)
    assert torch.equal(program.module()(taller), module(taller))


def test_autocast_gives_what_the_reference_gives(device):
    tensors = inputs_of((5, 100), torch.float16, device, weight_dtype=torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, low = ours(**tensors), reference(**tensors)
    assert y.dtype == low.dtype == torch.float32
    torch.testing.assert_close(y, low)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    rows, width = 2**19 + 3, 4096
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight = torch.randn(width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    y = ours(x, weight)
    last = x[-5:].detach().clone().requires_grad_()
    few = ours(last, weight)
    assert torch.equal(y[-5:], few)
    grad, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    total = torch.zeros(width, device="cuda")
    for part in x.detach().split(2**16):
        total += torch.nn.functional.rms_norm(part.float(), (width,), eps=1e-6).sum(0)
    assert torch.equal(grad[-5:], torch.autograd.grad(few, last, torch.ones_like(few))[0])
    torch.testing.assert_close(dweight.float(), total, rtol=1e-2, atol=2.0)  # of a deviation of some 700


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); it must have shape \(8,\)"),
        ({"residual": torch.ones(2, 8)}, ValueError, "residual has shape"),
        ({"residual": torch.ones(3, 8, dtype=torch.float16)}, TypeError, "residual has torch.float16"),
        ({"x": torch.ones(3, 8, dtype=torch.long)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "last dimension"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta but x on cpu"),
        ({"rounding": "qwen"}, ValueError, "'qwen'; it must be"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
        ({"x": torch.ones(3, 8, dtype=torch.float64), "impl": "triton"}, TypeError, "float64"),
        (
            {"x": torch.ones(1, 40000), "weight": torch.ones(40000), "impl": "triton"},
            ValueError,
            "40000 columns|needs a GPU",
        ),
    ],
)
def test_bad_input_gets_one_sentence(change, error, words):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(8), "impl": "torch", **change}
    with pytest.raises(error, match=words) as caught:
        rms_norm(**arguments)
    assert "\n" not in str(caught.value)
