"""NF4 against bitsandbytes, bit for bit."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import pytest
import torch

from fvlm_kernels import dequantize_nf4, quantize_nf4
from fvlm_kernels.nf4_format import NF4_VALUES, dynamic_code

SHAPES = [(64, 64), (3, 100), (7, 33), (130, 192), (300, 256)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weight_of(shape, dtype, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05
    return x.to(dtype).to(device)


def parts_of(state):
    nested = {} if state.state2 is None else {"nested_absmax": state.state2.absmax, "code": state.state2.code}
    return nested | {"offset": state.offset, "blocksize": state.blocksize}


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def in_fp32(packed, state):
    """What bitsandbytes gives in fp32 for a weight of any dtype: the same codes and scales, nothing rounded after."""
    state = copy.copy(state)
    state.dtype = torch.float32
    return bnb.dequantize_4bit(packed, state)


def halfway(exact, a, b):
    """Where an fp32 value lies exactly between two others that differ; a sum of two fp16 values is exact in fp64."""
    return (a != b) & (a.double() + b.double() == 2 * exact.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantizing_gives_the_same_bits(shape, dtype, nested, device):
    x = weight_of(shape, dtype, device)
    packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=nested, quant_type="nf4")
    ours = dequantize_nf4(packed, state.absmax, state.shape, dtype, **parts_of(state))
    exact = in_fp32(packed, state)
    assert same_bits(ours, exact.to(dtype))  # rounded once, to the nearest, ties to even
    theirs = bnb.dequantize_4bit(packed, state)
    if device == "cpu" and dtype == torch.float16:
        # Where there is a GPU, bitsandbytes loads its CUDA library, whose code for the CPU rounds ties away from zero.
        kept = ~halfway(exact, ours, theirs)
        ours, theirs = ours[kept], theirs[kept]
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_any_storage_dtype_is_read(storage, device):
    x = weight_of((32, 64), torch.float32, device)
    packed, state = bnb.quantize_4bit(x, compress_statistics=True, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    expected = bnb.dequantize_4bit(packed, state)
    assert same_bits(dequantize_nf4(packed, state.absmax, state.shape, x.dtype, **parts_of(state)), expected)


@pytest.mark.parametrize("blocksize", [32, 128, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizing_gives_the_same_bits(shape, dtype, blocksize):
    x = weight_of(shape, dtype, "cpu")
    packed, state = bnb.quantize_4bit(x, blocksize=blocksize, compress_statistics=False, quant_type="nf4")
    ours = quantize_nf4(x, blocksize, nested=False)
    assert same_bits(ours.packed, packed)
    assert same_bits(ours.absmax, state.absmax)


def test_nested_absmaxes_are_bitsandbytes_but_never_farther_from_the_truth():
    x = weight_of((2048, 512), torch.float32, "cpu")
    packed, state = bnb.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    ours = quantize_nf4(x)
    assert same_bits(ours.packed, packed)
    assert same_bits(ours.code, state.state2.code)
    assert torch.equal(ours.offset, state.offset)
    assert same_bits(ours.nested_absmax, state.state2.absmax)
    # bitsandbytes' compiled CPU quantizer does not always take the nearest of the 256 values.
    differs = ours.absmax != state.absmax
    assert differs.float().mean() < 0.005
    block = x.view(-1, 64).abs().amax(1) - ours.offset
    scale = ours.nested_absmax.repeat_interleave(256)
    error = (
        (ours.code[ours.absmax.long()] * scale - block).abs(),
        (ours.code[state.absmax.long()] * scale - block).abs(),
    )
    assert (error[0] <= error[1] + 1e-9).all()


def test_quantized_by_us_dequantized_by_bitsandbytes():
    x = weight_of((130, 192), torch.bfloat16, "cpu")
    ours = quantize_nf4(x)
    second = bnb.QuantState(absmax=ours.nested_absmax, code=ours.code, blocksize=256, dtype=torch.float32)
    state = bnb.QuantState(
        absmax=ours.absmax,
        shape=x.shape,
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=x.dtype,
        offset=ours.offset,
        state2=second,
    )
    parts = {"nested_absmax": ours.nested_absmax, "code": ours.code, "offset": ours.offset}
    back = dequantize_nf4(ours.packed, ours.absmax, x.shape, x.dtype, **parts)
    assert same_bits(bnb.dequantize_4bit(ours.packed, state), back)


def test_the_tables_are_bitsandbytes():
    assert torch.equal(torch.tensor(NF4_VALUES), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())


@pytest.mark.gpu
def test_quantizing_on_a_gpu_agrees_but_for_bitsandbytes_fast_maths():
    x = weight_of((2048, 1024), torch.bfloat16, "cuda")
    packed, state = bnb.quantize_4bit(x, compress_statistics=False, quant_type="nf4")
    ours = quantize_nf4(x, nested=False)
    assert same_bits(ours.absmax, state.absmax)
    assert (ours.packed != packed).float().mean() < 1e-4
