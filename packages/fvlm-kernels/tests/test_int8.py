from __future__ import annotations

import pytest
import torch

from fvlm_kernels import dequantize_int8
from fvlm_kernels.testing import poisoned_memory, randn


def weight_of(shape, device):
    w = randn(*shape, dtype=torch.float32, device=device, scale=0.05)
    scale = w.abs().amax(1)
    return (w * (127 / scale.unsqueeze(1))).round().to(torch.int8), scale


@pytest.mark.parametrize("shape", [(8, 64), (5, 100), (1, 1), (3, 5000)], ids=str)
def test_kernel_gives_the_bits_of_the_reference(shape, dtype, device):
    codes, scale = weight_of(shape, device)
    expected = dequantize_int8(codes, scale, dtype, impl="torch")
    with poisoned_memory():
        out = torch.empty(shape, dtype=dtype, device=device)
        assert dequantize_int8(codes, scale, dtype, out=out, impl="triton") is out
        assert torch.equal(dequantize_int8(codes, scale, dtype, impl="triton"), expected)
    assert torch.equal(out, expected)
    assert torch.equal(dequantize_int8(codes, scale, dtype, out=torch.empty_like(out), impl="torch"), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_is_within_half_a_step_of_what_was_quantized(impl, device):
    w = randn(6, 80, dtype=torch.float32, device=device, scale=0.05)
    codes, scale = weight_of((6, 80), device)
    back = dequantize_int8(codes, scale, torch.float32, impl=impl)
    assert ((back - w).abs() <= 0.5001 * scale.unsqueeze(1) / 127).all()
    largest = w.abs().argmax(1, keepdim=True)  # the element that sets the scale comes back as it was
    torch.testing.assert_close(back.gather(1, largest), w.gather(1, largest))


def test_codes_that_are_not_contiguous_and_scales_in_half_precision(device):
    codes, scale = weight_of((6, 80), device)
    for impl in ("torch", "triton"):
        turned = dequantize_int8(codes.t().contiguous().t(), scale.half(), torch.float32, impl=impl)
        assert torch.equal(turned, dequantize_int8(codes, scale.half().float(), torch.float32, impl="torch"))


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    rows, width = 2**19 + 3, 4096
    codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
    scale = torch.rand(rows, device="cuda")
    whole = dequantize_int8(codes, scale, torch.bfloat16)
    assert torch.equal(whole[-5:], dequantize_int8(codes[-5:], scale[-5:], torch.bfloat16, impl="torch"))


def test_empty(device):
    codes = torch.zeros(0, 4, dtype=torch.int8, device=device)
    for impl in ("torch", "triton"):
        assert dequantize_int8(codes, torch.zeros(0, device=device), torch.float16, impl=impl).shape == (0, 4)


def test_operators_pass_opcheck(device):
    codes, scale = weight_of((5, 40), device)
    torch.library.opcheck(torch.ops.fvlm.int8_dequantize.default, (codes, scale, torch.float16))
    torch.library.opcheck(
        torch.ops.fvlm.int8_dequantize_into.default, (codes, scale, torch.empty(5, 40, device=device))
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_as_one_graph(impl, device):
    codes, scale = weight_of((5, 40), device)

    def layer(x, codes, scale):
        return x @ dequantize_int8(codes, scale, torch.float32, impl=impl).t()

    x = randn(3, 40, dtype=torch.float32, device=device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, codes, scale), layer(x, codes, scale))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"codes": torch.zeros(4, 6)}, TypeError, "codes has dtype torch.float32"),
        ({"codes": torch.zeros(4, dtype=torch.int8)}, ValueError, r"codes has shape \(4,\)"),
        ({"scale": torch.zeros(6)}, ValueError, r"scale has shape \(6,\)"),
        ({"scale": torch.zeros(4, dtype=torch.int8)}, TypeError, "scale has dtype"),
        ({"scale": torch.zeros(4, device="meta")}, ValueError, "scale is on meta"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"out": torch.zeros(6, 4)}, ValueError, "out has shape"),
        ({"out": torch.zeros(6, 4).t()}, ValueError, "contiguous"),
        ({"out": torch.zeros(4, 6, dtype=torch.float16)}, TypeError, "out has dtype torch.float16"),
    ],
)
def test_bad_input_gets_one_sentence(change, error, words):
    arguments = {"codes": torch.zeros(4, 6, dtype=torch.int8), "scale": torch.ones(4), "dtype": torch.float32} | change
    with pytest.raises(error, match=words) as caught:
        dequantize_int8(**arguments)
    assert "\n" not in str(caught.value)
