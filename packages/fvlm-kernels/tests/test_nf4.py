from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch

from fvlm_kernels import NF4Weight, dequantize_nf4, quantize_nf4
from fvlm_kernels.nf4 import dequantize_weight
from fvlm_kernels.nf4_format import NF4_VALUES
from fvlm_kernels.testing import poisoned_memory, randn

SHAPES = [(64, 64), (1, 64), (3, 100), (7, 33), (1, 1), (2, 3, 32), (260, 64), (9, 130)]
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def same_bits(a, b):
    """Equal to the last bit, and zeros of one sign."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def weight_of(shape, device, dtype=torch.float32, nested=True, blocksize=64, impl="torch"):
    x = randn(*shape, dtype=dtype, device=device, seed=sum(shape), scale=0.05)
    return quantize_nf4(x, blocksize, nested=nested, impl=impl)


def by_hand(weight):
    """The format's definition, one element at a time."""
    data = weight.packed.reshape(-1).view(torch.uint8).tolist()
    absmax = weight.absmax.tolist()
    if weight.nested:
        code, nested = weight.code.cpu(), weight.nested_absmax.cpu()
        absmax = [float(code[q] * nested[b // 256] + weight.offset.cpu()) for b, q in enumerate(absmax)]
    out = []
    for i in range(prod(weight.shape)):
        nibble = data[i // 2] >> 4 if i % 2 == 0 else data[i // 2] & 15
        out.append(torch.tensor(NF4_VALUES[nibble]) * torch.tensor(absmax[i // weight.blocksize]))
    return torch.stack(out).view(weight.shape)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("shape", "blocksize"), [((3, 100), 64), ((5, 33), 32), ((4, 64), 128), ((1, 1), 64)])
def test_is_what_the_format_says(shape, blocksize, nested, impl, device):
    weight = weight_of(shape, device, nested=nested, blocksize=blocksize)
    assert same_bits(dequantize_weight(weight, impl=impl).cpu(), by_hand(weight))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_bits_of_the_reference(shape, nested, dtype, device):
    weight = weight_of(shape, device, nested=nested)
    expected = dequantize_weight(weight, dtype, impl="torch")
    with poisoned_memory():
        assert same_bits(dequantize_weight(weight, dtype, impl="triton"), expected)
        out = torch.empty(shape, dtype=dtype, device=device)
        assert dequantize_weight(weight, dtype, out=out, impl="triton") is out
    assert same_bits(out, expected)
    assert same_bits(dequantize_weight(weight, dtype, out=torch.empty_like(out), impl="torch"), expected)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_other_block_sizes(blocksize, device):
    weight = weight_of((3, 3000), device, blocksize=blocksize)
    assert same_bits(dequantize_weight(weight, impl="triton"), dequantize_weight(weight, impl="torch"))


def test_more_than_one_nested_block_and_many_programs(device):
    weight = weight_of((300, 128), device)  # 600 blocks: three nested scales, the last for a part of 256
    assert weight.nested_absmax.shape == (3,)
    assert weight.nested_absmax.unique().numel() == 3
    assert same_bits(dequantize_weight(weight, impl="triton"), dequantize_weight(weight, impl="torch"))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_any_storage_dtype_and_layout(storage, impl, device):
    weight = weight_of((8, 64), device)
    expected = dequantize_weight(weight, impl=impl)
    stored = weight.packed.view(-1).view(storage)
    spread = torch.zeros(stored.numel(), 2, dtype=storage, device=device)
    spread[:, 0] = stored
    for packed in (stored, stored.unsqueeze(1).t(), spread[:, :1]):
        parts = {"nested_absmax": weight.nested_absmax, "code": weight.code, "offset": weight.offset}
        got = dequantize_nf4(packed, weight.absmax, (8, 64), torch.float32, **parts, impl=impl)
        assert same_bits(got, expected)


def test_a_view_that_does_not_begin_at_a_word(device):
    weight = weight_of((8, 64), device)
    shifted = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8, device=device)[1:]
    shifted.copy_(weight.packed.view(-1))
    parts = {"nested_absmax": weight.nested_absmax, "code": weight.code, "offset": weight.offset}
    got = dequantize_nf4(shifted, weight.absmax, (8, 64), torch.float32, **parts, impl="triton")
    assert same_bits(got, dequantize_weight(weight, impl="torch"))


@pytest.mark.parametrize("blocksize", [64, 32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizing_kernel_gives_the_bits_of_the_reference(shape, blocksize, dtype, device):
    x = randn(*shape, dtype=dtype, device=device, seed=5)
    x.view(-1)[: min(64, x.numel())] = 0  # a block of zeros
    with poisoned_memory():
        ours = quantize_nf4(x, blocksize, impl="triton")
    expected = quantize_nf4(x, blocksize, impl="torch")
    for name in ("packed", "absmax", "nested_absmax", "code", "offset"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_each_element_becomes_the_nearest_value(impl, device):
    x = randn(16, 64, dtype=torch.float32, device=device)
    weight = quantize_nf4(x, nested=False, impl=impl)
    values = torch.tensor(NF4_VALUES, device=device)
    absmax = x.abs().amax(1, keepdim=True)
    assert torch.equal(weight.absmax, absmax.view(-1))
    best = (x.unsqueeze(-1) - values * absmax.unsqueeze(-1)).abs().amin(-1)
    got = (x - dequantize_weight(weight, impl="torch")).abs()
    assert torch.allclose(got, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ties_go_to_the_lower_value(impl, device):
    values = torch.tensor(NF4_VALUES, device=device)
    x = torch.cat(((values[:-1] + values[1:]) / 2, torch.ones(1, device=device)))
    weight = quantize_nf4(x, 32, nested=False, impl=impl)
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), -1).view(-1)
    assert codes.tolist() == list(range(16))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_values_of_the_format_survive(impl, device):
    x = torch.tensor(NF4_VALUES, device=device).repeat(4).view(2, 32) * 0.75
    weight = quantize_nf4(x, 32, nested=False, impl=impl)
    assert torch.equal(dequantize_weight(weight, impl=impl), x)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_stays_nan_and_keeps_to_its_block(impl, device):
    x = randn(4, 64, dtype=torch.float32, device=device)
    x[2, 5] = float("nan")
    back = dequantize_weight(quantize_nf4(x, nested=False, impl=impl), impl=impl)
    assert back[2].isnan().all()
    assert back[[0, 1, 3]].isfinite().all()


def test_quantizing_what_is_not_contiguous(device):
    x = randn(6, 64, dtype=torch.float32, device=device)
    for impl in ("torch", "triton"):
        turned = quantize_nf4(x.t().contiguous().t(), impl=impl)
        assert torch.equal(turned.packed, quantize_nf4(x, impl=impl).packed)


def test_a_weight_has_no_gradient(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    for impl in ("torch", "triton"):
        assert not dequantize_weight(quantize_nf4(x, impl=impl), impl=impl).requires_grad


def test_operators_pass_opcheck(device):
    for nested in (True, False):
        weight = weight_of((5, 40), device, nested=nested)
        parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.code, weight.offset, weight.blocksize)
        torch.library.opcheck(torch.ops.fvlm.nf4_dequantize.default, (*parts, (5, 40), torch.float16))
        out = torch.empty(5, 40, device=device)
        torch.library.opcheck(torch.ops.fvlm.nf4_dequantize_into.default, (*parts, out))
    torch.library.opcheck(torch.ops.fvlm.nf4_quantize.default, (torch.randn(5, 40, device=device), 64))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_as_one_graph(impl, device):
    weight = weight_of((8, 64), device)
    x = randn(3, 64, dtype=torch.float32, device=device)

    def layer(x, packed, absmax, nested_absmax, code, offset, buffer):
        keywords = {"nested_absmax": nested_absmax, "code": code, "offset": offset, "impl": impl}
        w = dequantize_nf4(packed, absmax, (8, 64), torch.float32, **keywords)
        dequantize_nf4(packed, absmax, (8, 64), torch.float32, out=buffer, **keywords)
        return x @ w.t() + x @ buffer.t()

    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.code, weight.offset)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    buffers = [torch.zeros(8, 64, device=device) for _ in range(2)]
    fused = torch.compile(layer, fullgraph=True, backend=backend)(x, *parts, buffers[0])
    torch.testing.assert_close(fused, layer(x, *parts, buffers[1]))
    if impl == "torch" and backend == "inductor":  # its own code contracts code · absmax + offset
        torch.testing.assert_close(*buffers)
    else:
        assert same_bits(*buffers)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    rows = 2**19 + 1
    packed = torch.randint(0, 256, (rows * 2048, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * 64, device="cuda")
    whole = dequantize_nf4(packed, absmax, (rows, 4096), torch.bfloat16)
    tail = dequantize_nf4(packed[-4096:], absmax[-128:], (2, 4096), torch.bfloat16, impl="torch")
    assert same_bits(whole[-2:], tail)


@pytest.mark.gpu
def test_quantizes_beyond_two_to_the_31():
    rows = 2**19 + 1
    x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="cuda").normal_()
    whole, tail = quantize_nf4(x, nested=False), quantize_nf4(x[-2:], nested=False, impl="torch")
    assert torch.equal(whole.packed[-4096:], tail.packed)
    assert torch.equal(whole.absmax[-128:], tail.absmax)


good = partial(weight_of, (4, 64), torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shape": (4, 65)}, ValueError, r"packed holds 128 bytes; a weight of shape \(4, 65\) takes 130"),
        ({"absmax": torch.zeros(3, dtype=torch.uint8)}, ValueError, r"absmax has shape \(3,\); it must have shape \(4"),
        ({"absmax": torch.zeros(4)}, TypeError, "absmax has dtype torch.float32"),
        ({"code": None}, ValueError, "code missing"),
        ({"offset": None, "code": None}, ValueError, "code and offset missing"),
        ({"nested_absmax": None, "offset": None, "code": None}, TypeError, "absmax has dtype torch.uint8"),
        ({"code": torch.zeros(16)}, ValueError, "code has shape"),
        ({"offset": torch.zeros(2)}, ValueError, "offset has shape"),
        ({"nested_absmax": torch.zeros(2)}, ValueError, "nested_absmax has shape"),
        ({"blocksize": 48}, ValueError, "blocksize is 48"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"out": torch.zeros(64, 4)}, ValueError, "out has shape"),
        ({"out": torch.zeros(64, 4).t()}, ValueError, "must be contiguous"),
        ({"out": torch.zeros(4, 64, dtype=torch.float16)}, TypeError, "out has dtype torch.float16"),
        ({"out": torch.zeros(4, 64, device="meta")}, ValueError, "packed is on cpu but out on meta"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
        ({"dtype": torch.float64, "impl": "triton"}, TypeError, "float64"),
    ],
)
def test_bad_parts_get_one_sentence(change, error, words):
    weight = good()
    arguments = {name: getattr(weight, name) for name in NF4Weight.__dataclass_fields__} | change
    with pytest.raises(error, match=words) as caught:
        dequantize_nf4(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": torch.zeros(0, 4)}, ValueError, r"shape \(0, 4\)"),
        ({"x": torch.zeros(4, dtype=torch.long)}, TypeError, "int64"),
        ({"x": torch.zeros(4), "blocksize": 16}, ValueError, "blocksize is 16"),
    ],
)
def test_bad_weights_get_one_sentence(arguments, error, words):
    with pytest.raises(error, match=words):
        quantize_nf4(**arguments)
