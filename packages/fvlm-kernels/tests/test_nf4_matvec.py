from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from fvlm_kernels import nf4_matvec, quantize_nf4
from fvlm_kernels.nf4_matvec import _block_n, _shape_of_launch, matvec_weight
from fvlm_kernels.testing import assert_deterministic, check_against_reference, randn, strided

SHAPES = [(16, 64), (5, 72), (1, 8), (40, 320), (9, 2056), (9, 2560)]  # the last two are split over programs


def weight_of(shape, device, nested=True, blocksize=64):
    w = randn(*shape, dtype=torch.float32, device=device, seed=3, scale=shape[1] ** -0.5)
    return quantize_nf4(w, blocksize, nested=nested, impl="torch")


def check(weight, x):
    check_against_reference(
        lambda x: matvec_weight(x, weight, impl="triton"), lambda x: matvec_weight(x, weight, impl="torch"), {"x": x}
    )


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy(shape, nested, dtype, device):
    check(weight_of(shape, device, nested), randn(1, shape[1], dtype=dtype, device=device))


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("rows", [2, 3, 8])
def test_several_rows(rows, programs, dtype, device, monkeypatch):
    """Also where one row takes other numbers of rows of the weight together than several rows do."""
    monkeypatch.setattr(sys.modules[_shape_of_launch.__module__], "PROGRAMS", programs)
    assert (_block_n(9, 1, 16, 1), _block_n(9, rows, 16, 1)) == {1: (4, 2 if rows == 8 else 4), 1024: (1, 1)}[programs]
    weight = weight_of((9, 72), device)
    x = randn(rows, 72, dtype=dtype, device=device)
    check(weight, x)
    whole = matvec_weight(x, weight, impl="triton")
    assert torch.equal(whole[1], matvec_weight(x[1], weight, impl="triton"))  # a row does not depend on its batch


def test_split_rows_are_tested():
    assert _shape_of_launch(9, 2056 // 8) == (128, 1, 3, 1)  # an odd number of words: one a thread
    assert _shape_of_launch(40, 40) == (32, 2, 1, 1)
    assert _shape_of_launch(9, 320) == (128, 2, 2, 1)
    assert _shape_of_launch(1536, 1120) == (128, 2, 1, 5)  # enough rows: a program loops over their width
    assert _shape_of_launch(8960, 192) == (32, 2, 1, 3)


@pytest.mark.parametrize("width", [2056, 2560], ids=["a word a thread", "two words a thread"])
def test_a_program_that_loops(width, device, monkeypatch):
    monkeypatch.setattr(sys.modules[_shape_of_launch.__module__], "PROGRAMS", 1)
    assert _shape_of_launch(9, width // 8)[2:] == (1, 3 if width == 2056 else 2)
    check(weight_of((9, width), device), randn(2, width, dtype=torch.float32, device=device))


def test_programs_of_one_warp_that_loop(device, monkeypatch):
    """As of many rows."""
    monkeypatch.setattr(sys.modules[_shape_of_launch.__module__], "MANY_ROWS", 1)
    monkeypatch.setattr(sys.modules[_shape_of_launch.__module__], "PROGRAMS", 1)
    assert _shape_of_launch(9, 40) == (32, 2, 1, 1)
    assert _shape_of_launch(9, 320) == (32, 2, 1, 5)
    for width in (320, 2560):
        check(weight_of((9, width), device), randn(2, width, dtype=torch.float32, device=device))


def test_how_many_rows_of_the_weight_a_program_takes():
    assert [_block_n(18944, rows, 32, 1) for rows in (1, 4, 5, 8)] == [4, 4, 2, 2]
    assert [_block_n(n, 1, 32, 1) for n in (64, 2048, 4096)] == [1, 2, 4]
    assert [_block_n(n, 1, 128, 1) for n in (64, 2048, 4096)] == [1, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [2056, 2560])
def test_codes_looked_up_in_memory_give_the_same_bits(width, monkeypatch):
    """What Triton's interpreter and other GPUs run."""
    weight, x = weight_of((9, width), "cuda"), randn(3, width, dtype=torch.bfloat16, device="cuda")
    shuffled = matvec_weight(x, weight)
    monkeypatch.setattr(sys.modules[_shape_of_launch.__module__], "SHUFFLES", False)
    assert torch.equal(matvec_weight(x, weight), shuffled)


@pytest.mark.parametrize("blocksize", [32, 256])
def test_other_block_sizes_and_blocks_that_straddle_rows(blocksize, device):
    check(weight_of((7, 72), device, blocksize=blocksize), randn(1, 72, dtype=torch.float32, device=device))


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    """Rows of W behind 2³¹ elements equal those of their own weight."""
    n, k = 2**19 + 8, 4096
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda")
    absmax, x = torch.rand(n * k // 64, device="cuda"), torch.randn(2, k, device="cuda", dtype=torch.bfloat16)
    whole = nf4_matvec(x, packed, absmax, (n, k))
    few = nf4_matvec(x, packed[-8 * k // 2 :], absmax[-8 * k // 64 :], (8, k), impl="torch")
    torch.testing.assert_close(whole[:, -8:], few, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("shape", [(6, 33), (6, 36)], ids=str)
def test_widths_that_are_no_multiple_of_eight(shape, device):
    check(weight_of(shape, device), randn(2, shape[1], dtype=torch.float32, device=device))


def test_layouts_and_leading_dimensions(device):
    weight = weight_of((9, 64), device)
    for x in (randn(64, dtype=torch.float32, device=device), randn(2, 1, 64, dtype=torch.float32, device=device)):
        check(weight, x)
    check(weight, strided(randn(3, 64, dtype=torch.float32, device=device)))
    assert matvec_weight(torch.zeros(0, 64, device=device), weight, impl="triton").shape == (0, 9)


def test_equals_the_parts_given_apart(device):
    w = weight_of((9, 64), device)
    x = randn(1, 64, dtype=torch.float32, device=device)
    parts = {"nested_absmax": w.nested_absmax, "code": w.code, "offset": w.offset}
    for impl in ("torch", "triton"):
        apart = nf4_matvec(x, w.packed, w.absmax, w.shape, **parts, impl=impl)
        assert torch.equal(apart, matvec_weight(x, w, impl=impl))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_beyond_the_tensors_counts_or_is_written(rows, nested, device, monkeypatch):
    """9 rows are not whole blocks of 4, nor 12 pairs of words one of 16: NaN behind the scales must stay behind y."""
    monkeypatch.setattr(sys.modules[_shape_of_launch.__module__], "PROGRAMS", 1)
    assert _block_n(9, rows, 16, 1) == 4
    weight = weight_of((9, 192), device, nested)
    scale = weight.nested_absmax if nested else weight.absmax
    padded = torch.cat((scale, scale.new_full((64,), float("nan"))))[: scale.numel()]
    guarded = replace(weight, **{"nested_absmax" if nested else "absmax": padded})
    module = sys.modules[_shape_of_launch.__module__]
    start, behind = module.launch, []

    def guarded_launch(kernel, grid, *args, **meta):
        (at,) = (i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dim() == 3)
        y = args[at].new_full((args[at].numel() + 64,), float("nan"))
        start(kernel, grid, *args[:at], y, *args[at + 1 :], **meta)
        args[at].copy_(y[: args[at].numel()].view_as(args[at]))
        behind.append(y[args[at].numel() :])

    monkeypatch.setattr(module, "launch", guarded_launch)
    x = randn(rows, 192, dtype=torch.float32, device=device)
    y = matvec_weight(strided(x, gap=64), guarded, impl="triton")
    assert len(behind) == 1
    assert behind[0].isnan().all()
    torch.testing.assert_close(y, matvec_weight(x, weight, impl="torch"))


def test_two_runs_give_the_same_bits(device):
    weight = weight_of((9, 2056), device)
    x = randn(2, 2056, dtype=torch.float16, device=device)
    assert_deterministic(lambda x: matvec_weight(x, weight, impl="triton"), {"x": x})


def test_operator_passes_opcheck(device):
    for shape in ((9, 64), (6, 33)):
        weight = weight_of(shape, device)
        x = randn(2, shape[1], dtype=torch.float32, device=device)
        torch.library.opcheck(torch.ops.fvlm.nf4_matvec.default, (x, *weight.parts, weight.blocksize, shape[0]))


def test_compiles_as_one_graph(device):
    weight = weight_of((9, 64), device)
    x = randn(2, 64, dtype=torch.float32, device=device)

    def layer(x):
        return matvec_weight(x * 2, weight, impl="triton") + 1

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(9, 64), ValueError, "x has 9 rows; it takes up to 8"),
        (torch.ones(2, 65), ValueError, r"x has shape \(2, 65\) and the weight \(9, 64\)"),
        (torch.ones(2, 64, dtype=torch.long), TypeError, "x has dtype torch.int64"),
        (torch.ones(2, 64, device="meta"), ValueError, "packed is on cpu but x on meta"),
        (torch.ones(2, 64, requires_grad=True), ValueError, "x requires a gradient"),
    ],
)
def test_bad_input_gets_one_sentence(x, error, words):
    with pytest.raises(error, match=words) as caught:
        matvec_weight(x, weight_of((9, 64), "cpu"))
    assert "\n" not in str(caught.value)


def test_a_gradient_is_no_matter_where_none_is_recorded(device):
    x = torch.ones(1, 64, device=device, requires_grad=True)
    with torch.no_grad():
        assert not matvec_weight(x, weight_of((9, 64), device)).requires_grad
