from __future__ import annotations

import pytest
import torch

from fvlm_kernels import LoRALinear, NF4Weight, _decode_products, lora_decode, lora_decode_gated, quantize_nf4
from fvlm_kernels._decode_products import _block_n
from fvlm_kernels.lora_decode import _group
from fvlm_kernels.testing import assert_deterministic, check_against_reference, randn, strided

SHAPES = [((16, 64),), ((40, 72), (5, 72), (9, 72)), ((9, 2056), (12, 2056))]


def layer_of(shape, device, rank=4, nested=True, bias=True, seed=0, dtype=torch.float32):
    n, k = shape
    w = randn(n, k, dtype=torch.float32, device=device, seed=seed, scale=k**-0.5)
    base = quantize_nf4(w, 64, nested=nested, impl="torch")
    a = randn(rank, k, dtype=dtype, device=device, seed=seed + 1, scale=k**-0.5) if rank else None
    b = randn(n, rank, dtype=dtype, device=device, seed=seed + 2) if rank else None
    vector = randn(n, dtype=dtype, device=device, seed=seed + 3) if bias else None
    return LoRALinear(base, a, b, 0.5 + seed / 100, vector)


def layers_of(shapes, device, **kwargs):
    return [layer_of(shape, device, seed=10 * i, **kwargs) for i, shape in enumerate(shapes)]


def check(layers, x):
    def run(impl):
        return lambda x: lora_decode(x, layers, impl=impl, lora_dtype=x.dtype)

    check_against_reference(run("triton"), run("torch"), {"x": x})


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_policy(shapes, rows, dtype, device):
    check(layers_of(shapes, device), randn(rows, shapes[0][1], dtype=dtype, device=device))


@pytest.mark.parametrize(
    "kwargs", [{"rank": 0}, {"rank": 3}, {"bias": False}, {"nested": False}, {"rank": 0, "bias": False}], ids=str
)
def test_layers_of_other_kinds(kwargs, device):
    check(layers_of(SHAPES[1], device, **kwargs), randn(2, 72, dtype=torch.float32, device=device))


def test_layers_that_share_no_launch(device):
    layers = [layer_of((9, 72), device, rank=4), layer_of((5, 72), device, rank=2, seed=10)]
    layers += [layer_of((6, 72), device, rank=0, seed=20), layer_of((6, 72), device, bias=False, seed=30)]
    check(layers, randn(2, 72, dtype=torch.float32, device=device))


def test_bases_that_are_not_packed_in_words(device):
    plain = LoRALinear(randn(6, 36, dtype=torch.float32, device=device), bias=None)
    assert _group(plain) is None
    assert _group(layer_of((6, 36), device)) is None
    check([plain, layer_of((5, 36), device)], randn(1, 36, dtype=torch.float32, device=device))


def test_programs_take_more_rows_of_large_weights():
    assert [_block_n(n, 1) for n in (1536, 2048, 4096, 17920)] == [1, 2, 4, 4]
    assert [_block_n(4096, rows) for rows in (2, 4, 8)] == [4, 2, 1]


@pytest.mark.parametrize("rows", [1, 2])
def test_programs_of_several_rows(rows, device, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[_block_n.__module__], "PROGRAMS", 4)
    assert _block_n(54, rows) == 4
    check(layers_of(SHAPES[1], device), randn(rows, 72, dtype=torch.float32, device=device))


def test_layouts_determinism_and_rows_by_themselves(device):
    layers = layers_of(SHAPES[1], device)
    check(layers, randn(2, 1, 72, dtype=torch.float32, device=device))
    check(layers, strided(randn(3, 72, dtype=torch.float32, device=device)))
    x = randn(3, 72, dtype=torch.float32, device=device)
    assert_deterministic(lambda x: lora_decode(x, layers, impl="triton"), {"x": x})
    for whole, alone in zip(
        lora_decode(x, layers, impl="triton"), lora_decode(x[1], layers, impl="triton"), strict=True
    ):
        assert torch.equal(whole[1], alone)


def test_reads_parameters_where_they_lie(device):
    (layer,) = layers_of(SHAPES[0], device)
    x = randn(1, 64, dtype=torch.float32, device=device)
    before = lora_decode(x, [layer], impl="triton")[0].clone()
    layer.b.mul_(2)
    (after,) = lora_decode(x, [layer], impl="triton")
    expected = lora_decode(x, [layer], impl="torch")[0]
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after)


def test_an_adapter_of_fp32_is_rounded_as_it_is_read(device):
    (layer,) = layers_of(SHAPES[0], device)
    x = randn(2, 64, dtype=torch.float16, device=device)
    with torch.autocast(x.device.type, torch.float16):
        ours, theirs = (lora_decode(x, [layer], impl=impl)[0] for impl in ("triton", "torch"))
    assert ours.dtype == theirs.dtype == torch.float16
    torch.testing.assert_close(ours, theirs, rtol=4e-3, atol=4e-3)


def test_refusals(device):
    (layer,) = layers_of(SHAPES[0], device)
    with pytest.raises(ValueError, match="takes up to 8"):
        lora_decode(torch.zeros(9, 64, device=device), [layer])
    with pytest.raises(ValueError, match="requires a gradient"):
        lora_decode(torch.zeros(1, 64, device=device, requires_grad=True), [layer])
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        lora_decode(torch.zeros(1, 63, device=device), [layer])
    with pytest.raises(ValueError, match="no layers"):
        lora_decode(torch.zeros(1, 64, device=device), [])
    assert lora_decode(torch.zeros(0, 64, device=device), [layer])[0].shape == (0, 16)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 3])
def test_gated_pairs(rows, activation, dtype, device):
    gate, up = layers_of(((21, 72), (21, 72)), device)

    def run(impl):
        return lambda x: lora_decode_gated(x, gate, up, activation, impl=impl, lora_dtype=x.dtype)

    check_against_reference(run("triton"), run("torch"), {"x": randn(rows, 72, dtype=dtype, device=device)})


def test_gated_programs_of_several_rows(device, monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules[_block_n.__module__], "PROGRAMS", 4)
    assert _block_n(21, 4) == 2  # as for a pair and one row of x
    gate, up = layers_of(((21, 2056), (21, 2056)), device)
    x = randn(1, 2056, dtype=torch.float32, device=device)
    ours, theirs = (lora_decode_gated(x, gate, up, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gated_pairs_that_share_no_launch(device):
    gate, up = layer_of((21, 72), device), layer_of((21, 72), device, rank=2, seed=10)
    x = randn(2, 72, dtype=torch.float32, device=device)
    ours, theirs = (lora_decode_gated(x, gate, up, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="must be alike"):
        lora_decode_gated(x, gate, layer_of((9, 72), device))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        lora_decode_gated(x, gate, up, "relu")


def test_operator_passes_opcheck(device):
    layers = layers_of(SHAPES[1][:2], device)
    x = randn(2, 72, dtype=torch.float32, device=device)
    tensors = [part for layer in layers for part in (*layer.base.parts, layer.bias, layer.a, layer.b)]
    for sizes, act in (([40, 5], ""), ([40, 40], "silu")):
        given = tensors if not act else tensors[:8] * 2
        torch.library.opcheck(
            torch.ops.fvlm.lora_decode.default, (x, x, given, [0.5, 0.6], sizes, 64, torch.float32, act)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_codes_looked_up_in_memory_give_the_same_bits(rows, monkeypatch):
    """What Triton's interpreter and other GPUs run."""
    layers, x = layers_of(SHAPES[2], "cuda"), randn(rows, 2056, dtype=torch.bfloat16, device="cuda")
    shuffled = lora_decode(x, layers)
    monkeypatch.setattr(_decode_products, "SHUFFLES", False)
    assert all(torch.equal(a, b) for a, b in zip(lora_decode(x, layers), shuffled, strict=True))


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    """Rows of W behind 2³¹ elements equal those of their own weight."""
    n, k = 2**19 + 8, 4096
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda")
    absmax, x = torch.rand(n * k // 64, device="cuda"), torch.randn(2, k, device="cuda", dtype=torch.bfloat16)
    (whole,) = lora_decode(x, [LoRALinear(NF4Weight(packed, absmax, (n, k), torch.bfloat16))])
    last = NF4Weight(packed[-8 * k // 2 :].clone(), absmax[-8 * k // 64 :].clone(), (8, k), torch.bfloat16)
    (few,) = lora_decode(x, [LoRALinear(last)])
    assert torch.equal(whole[:, -8:], few)
