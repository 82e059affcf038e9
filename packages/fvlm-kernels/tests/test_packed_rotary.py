from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.library import opcheck

from fvlm_kernels import packed_vision_rotary, vision_rotary
from fvlm_kernels.testing import assert_deterministic, check_against_reference, randn, run_with_gradients


def inputs(tokens, heads, width, dtype, device, rotated=None):
    angles = randn(tokens, (rotated or width) // 2, dtype=torch.float32, device=device, seed=9, scale=3.0).repeat(1, 2)
    qkv = randn(tokens, 3, heads, width, dtype=dtype, device=device, seed=1)
    return {"qkv": qkv, "cos": angles.cos(), "sin": angles.sin()}


def apart(qkv, cos, sin, impl):
    """Split, rotate, and let autograd join the gradients."""
    q, k, v = qkv.unbind(1)
    return *vision_rotary(q, k, cos, sin, impl=impl), v


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "rotated"), [(9, 16, 80, 80), (1, 3, 64, 64), (5, 4, 72, 36), (33, 2, 128, 128)]
)
def test_policy(tokens, heads, width, rotated, dtype, device):
    tensors = inputs(tokens, heads, width, dtype, device, rotated)
    check_against_reference(
        partial(packed_vision_rotary, impl="triton"), partial(packed_vision_rotary, impl="torch"), tensors, ("qkv",)
    )


def test_the_same_bits_as_apart(dtype, device):
    tensors = inputs(9, 4, 80, dtype, device)
    ours = run_with_gradients(partial(packed_vision_rotary, impl="triton"), tensors, ("qkv",))
    other = run_with_gradients(partial(apart, impl="triton"), tensors, ("qkv",))
    assert all(torch.equal(x, y) for x, y in zip(ours[0], other[0], strict=True))
    assert torch.equal(ours[1]["qkv"], other[1]["qkv"])


def test_values_share_memory_and_their_gradient_arrives_alone(device):
    tensors = inputs(7, 2, 16, torch.float32, device)
    qkv = tensors["qkv"].requires_grad_()
    *_, v = packed_vision_rotary(qkv, tensors["cos"], tensors["sin"], impl="triton")
    assert v.data_ptr() == qkv[:, 2].data_ptr()
    v.backward(torch.ones_like(v))
    assert qkv.grad[:, :2].abs().max() == 0
    assert torch.equal(qkv.grad[:, 2], torch.ones_like(v))


def test_two_runs_give_the_same_bits(device):
    tensors = inputs(9, 4, 80, torch.float32, device)
    assert_deterministic(partial(packed_vision_rotary, impl="triton"), tensors, ("qkv",))


def test_operators_pass_opcheck(device):
    tensors = inputs(6, 2, 16, torch.float32, device)
    opcheck(torch.ops.fvlm.packed_rotary_fwd.default, tuple(tensors.values()))
    grads = [randn(6, 2, 16, dtype=torch.float32, device=device, seed=s) for s in range(3)]
    opcheck(torch.ops.fvlm.packed_rotary_bwd.default, (*grads, tensors["cos"], tensors["sin"]))


def test_compiles_as_one_graph(device):
    tensors = inputs(6, 2, 16, torch.float32, device)
    op = partial(packed_vision_rotary, impl="triton")
    compiled = torch.compile(lambda qkv, cos, sin: op(qkv, cos, sin), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**tensors), op(**tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_empty(device):
    q, k, v = packed_vision_rotary(**inputs(0, 2, 16, torch.float32, device), impl="triton")
    assert q.shape == k.shape == v.shape == (0, 2, 16)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    tokens = 2**31 // (3 * 16 * 128) + 5
    angles = torch.randn(tokens, 64, device="cuda").repeat(1, 2)
    qkv = torch.empty(tokens, 3, 16, 128, dtype=torch.bfloat16, device="cuda").normal_()
    cos, sin = angles.cos(), angles.sin()
    last = qkv[-2:].clone().requires_grad_()
    few = packed_vision_rotary(last, cos[-2:], sin[-2:])
    (expected,) = torch.autograd.grad(few, last, [torch.ones_like(x) for x in few])
    whole = packed_vision_rotary(qkv.requires_grad_(), cos, sin)
    assert all(torch.equal(ours[-2:], theirs) for ours, theirs in zip(whole, few, strict=True))
    (grad,) = torch.autograd.grad(whole, qkv, [torch.ones_like(x) for x in whole])
    assert torch.equal(grad[-2:], expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t | {"qkv": t["qkv"][:, :2]}, ValueError, r"must be \(S, 3, H, D\)"),
        (lambda t: t | {"cos": t["cos"][:, :5]}, ValueError, "R even"),
        (lambda t: t | {"cos": t["cos"][:3], "sin": t["sin"][:3]}, ValueError, "cover 6 positions"),
        (lambda t: t | {"sin": t["sin"].half()}, TypeError, "sin has"),
        (lambda t: t | {"qkv": t["qkv"].int()}, TypeError, "floating"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, words, device):
    with pytest.raises(error, match=words):
        packed_vision_rotary(**change(inputs(6, 2, 16, torch.float32, device)), impl="triton")
