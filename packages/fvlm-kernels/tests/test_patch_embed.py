from __future__ import annotations

import pytest
import torch

from fvlm_kernels import patch_embed
from fvlm_kernels.testing import check_against_reference, randn, run_with_gradients

CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


def convolution(x, weight, bias=None):
    """The convolution that is replaced, its channels moved last."""
    return CONV[weight.dim() - 2](x, weight, bias, stride=weight.shape[2:]).movedim(1, -1)


CASES = {
    "Qwen2-VL": ((9, 3, 2, 14, 14), (40, 3, 2, 14, 14), False),
    "SigLIP": ((2, 3, 28, 42), (24, 3, 14, 14), True),
    "one patch": ((1, 3, 4, 4), (8, 3, 4, 4), True),
    "left over": ((2, 3, 11, 14), (8, 3, 4, 5), True),
    "frames": ((2, 3, 4, 8, 12), (16, 3, 2, 4, 4), False),
    "audio": ((2, 5, 12), (7, 5, 3), True),
    "none": ((0, 3, 8, 8), (8, 3, 4, 4), True),
}


@pytest.mark.parametrize("name", CASES)
def test_policy(name, dtype, device):
    x_shape, weight_shape, with_bias = CASES[name]
    tensors = {
        "x": randn(*x_shape, dtype=dtype, device=device, seed=1),
        "weight": randn(*weight_shape, dtype=dtype, device=device, seed=2, scale=0.1),
    }
    if with_bias:
        tensors["bias"] = randn(weight_shape[0], dtype=dtype, device=device, seed=3)
    check_against_reference(patch_embed, convolution, tensors, list(tensors))


def test_what_the_stride_leaves_over_is_not_read(device):
    x = randn(1, 2, 5, 7, dtype=torch.float32, device=device)
    x[:, :, 4:] = float("nan")
    x[:, :, :, 6:] = float("nan")
    weight = randn(3, 2, 2, 3, dtype=torch.float32, device=device)
    _, grads = run_with_gradients(patch_embed, {"x": x, "weight": weight}, ["x", "weight"])
    assert grads["weight"].isfinite().all()
    assert not grads["x"][:, :, 4:].any()


def test_one_patch_a_row_copies_nothing(device):
    x = randn(9, 3, 2, 4, 4, dtype=torch.float32, device=device).requires_grad_()
    weight = randn(8, 3, 2, 4, 4, dtype=torch.float32, device=device).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        patch_embed(x, weight)
    assert set(saved) == {x.data_ptr(), weight.data_ptr()}


def test_frozen_weight_saves_no_patches(device):
    """A frozen first layer keeps nothing for backward: not even its input."""
    x = randn(9, 3, 2, 4, 4, dtype=torch.float32, device=device)
    weight = randn(8, 3, 2, 4, 4, dtype=torch.float32, device=device)
    assert patch_embed(x, weight).grad_fn is None


def test_autocast_multiplies_in_the_low_dtype(device):
    x = randn(2, 3, 8, 8, dtype=torch.float32, device=device)
    weight = randn(8, 3, 4, 4, dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, low = patch_embed(x, weight), convolution(x, weight)
    assert y.dtype == low.dtype == torch.bfloat16
    torch.testing.assert_close(y, low)


def test_compiles_as_one_graph(device):
    x = randn(2, 3, 11, 14, dtype=torch.float32, device=device)
    weight = randn(8, 3, 4, 5, dtype=torch.float32, device=device)
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), convolution(x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "words"),
    [
        ((1, 3, 8, 8), (8, 4, 4, 4), None, r"x has shape \(1, 3, 8, 8\) and weight \(8, 4, 4, 4\)"),
        ((1, 3, 8), (8, 3, 4, 4), None, "as many dimensions"),
        ((1, 3), (8, 3), None, "as many dimensions"),
        ((1, 3, 3, 8), (8, 3, 4, 4), None, "smaller than one patch"),
        ((1, 3, 8, 8), (8, 3, 4, 4), (3,), r"bias has shape \(3,\)"),
    ],
)
def test_bad_input_gets_one_sentence(x, weight, bias, words):
    with pytest.raises(ValueError, match=words) as caught:
        patch_embed(torch.ones(x), torch.ones(weight), None if bias is None else torch.ones(bias))
    assert "\n" not in str(caught.value)
