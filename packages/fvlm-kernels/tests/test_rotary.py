from __future__ import annotations

from functools import partial

import pytest
import torch

from fvlm_kernels import multimodal_rotary, rotary, vision_rotary
from fvlm_kernels._rotation import _heads_at_once
from fvlm_kernels.testing import (
    assert_deterministic,
    assert_same_rounding,
    check_against_reference,
    randn,
    run_with_gradients,
)


def table(*shape, dtype, device):
    """Cosines and sines of random angles, the same in both halves of the last dimension."""
    angles = randn(*shape[:-1], shape[-1] // 2, dtype=torch.float32, device="cpu", seed=9, scale=3.0).repeat_interleave(
        1
    )
    angles = angles.view(*shape[:-1], shape[-1] // 2).repeat(*[1] * (len(shape) - 1), 2)
    return {"cos": angles.cos().to(dtype).to(device), "sin": angles.sin().to(dtype).to(device)}


def heads_of(batch, heads, kv_heads, length, width, dtype, device, layout="bshd"):
    """Queries and keys as attention layers make them: views of (B, S, H, D), slices of a fused QKV, or (B, H, S, D)."""
    if layout == "fused":
        qkv = randn(batch, length, heads + 2 * kv_heads, width, dtype=dtype, device=device, seed=1)
        q, k = qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads]
    else:
        q = randn(batch, length, heads, width, dtype=dtype, device=device, seed=1)
        k = randn(batch, length, kv_heads, width, dtype=dtype, device=device, seed=2)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return {"q": q.contiguous(), "k": k.contiguous()} if layout == "bhsd" else {"q": q, "k": k}


def check(op, tensors, wanted=("q", "k"), **keywords):
    check_against_reference(
        partial(op, impl="triton", **keywords), partial(op, impl="torch", **keywords), tensors, wanted
    )


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "fused"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "width", "rotated"),
    [
        (2, 4, 2, 3, 64, 64),
        (1, 12, 2, 2, 128, 128),
        (2, 3, 1, 1, 80, 80),
        (1, 5, 5, 3, 80, 20),
        (1, 40, 8, 1, 128, 128),
    ],
)
def test_policy(batch, heads, kv_heads, length, width, rotated, layout, dtype, device):
    tensors = heads_of(batch, heads, kv_heads, length, width, dtype, device, layout)
    check(rotary, tensors | table(batch, length, rotated, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(1, 3, 64), (3, 64)], ids=["one row for all", "no rows"])
def test_positions_shared_by_the_batch(shape, device):
    tensors = heads_of(2, 4, 2, 3, 64, torch.float32, device)
    check(rotary, tensors | table(*shape, dtype=torch.float32, device=device))


def test_heads_after_positions(dtype, device):
    tensors = {n: t.transpose(1, 2) for n, t in heads_of(2, 4, 2, 3, 64, dtype, device).items()}
    check(rotary, tensors | table(2, 3, 64, dtype=dtype, device=device), heads_dim=2)


def test_fp32_positions_promote_as_the_reference_does(device):
    tensors = heads_of(2, 4, 2, 3, 64, torch.float16, device)
    check(rotary, tensors | table(2, 3, 64, dtype=torch.float32, device=device))


def test_halves_of_different_angles(device):
    tensors = heads_of(1, 2, 2, 3, 64, torch.float32, device)
    tensors |= {n: randn(1, 3, 64, dtype=torch.float32, device=device, seed=s) for n, s in (("cos", 5), ("sin", 6))}
    check(rotary, tensors)


@pytest.mark.parametrize("gap", [False, True], ids=["dense", "channels apart"])
@pytest.mark.parametrize("width", [80, 72, 64])
def test_vision_policy(width, gap, dtype, device):
    qkv = randn(9, 3, 4, width, dtype=dtype, device=device)
    q, k = qkv[:, 0], qkv[:, 1]
    if gap:
        q = q.repeat_interleave(2, dim=-1)[..., ::2]
    check(vision_rotary, {"q": q, "k": k} | table(9, width, dtype=torch.float32, device=device))


SECTIONS = [([16, 24, 24], False), ([24, 20, 20], True), ([4, 2, 2], False), ([4, 2, 2], True), ([1, 2, 5], True)]


@pytest.mark.parametrize("once", [True, False], ids=["frequencies once", "frequencies twice"])
@pytest.mark.parametrize(("sections", "interleaved"), SECTIONS, ids=str)
def test_multimodal_policy(sections, interleaved, once, dtype, device):
    half = sum(sections)
    tensors = heads_of(2, 4, 2, 3, 2 * half, dtype, device)
    positions = table(3, 2, 3, 2 * half, dtype=dtype, device=device)
    if once:
        positions = {n: t[..., :half].contiguous() for n, t in positions.items()}
    check(multimodal_rotary, tensors | positions, sections=sections, interleaved=interleaved)


def test_rounds_where_the_reference_rounds(device):
    low = torch.bfloat16 if device.type == "cuda" else torch.float16
    tensors = heads_of(2, 6, 2, 5, 64, low, device) | table(2, 5, 64, dtype=low, device=device)
    packed = {"q": tensors["q"][0], "k": tensors["k"][0], "cos": tensors["cos"][0, :1], "sin": tensors["sin"][0, :1]}
    packed = {n: t.transpose(0, 1) if n in "qk" else t.expand(5, 64).contiguous() for n, t in packed.items()}
    for op, inputs in ((rotary, tensors), (vision_rotary, packed)):
        for a, b in zip(op(**inputs, impl="triton"), op(**inputs, impl="torch"), strict=True):
            assert_same_rounding(a, b)


def test_keeps_the_order_of_strides(device):
    for layout in ("bshd", "bhsd", "fused"):
        tensors = heads_of(2, 4, 2, 3, 64, torch.float32, device, layout) | table(
            2, 3, 64, dtype=torch.float32, device=device
        )
        q, _ = rotary(**tensors, impl="triton")
        assert (q.stride(1) < q.stride(2)) == (layout != "bhsd")


def test_turning_back_gives_the_input(device):
    tensors = heads_of(2, 4, 2, 3, 64, torch.float32, device)
    positions = table(2, 3, 64, dtype=torch.float32, device=device)
    there = rotary(**tensors, **positions, impl="triton")
    back = rotary(*there, positions["cos"], -positions["sin"], impl="triton")
    for a, b in zip(back, tensors.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_empty(device):
    tensors = heads_of(2, 4, 2, 0, 64, torch.float32, device) | table(2, 0, 64, dtype=torch.float32, device=device)
    out, grads = run_with_gradients(partial(rotary, impl="triton"), tensors, ["q", "k"])
    assert [t.shape for t in out] == [t.shape for t in grads.values()] == [(2, 4, 0, 64), (2, 2, 0, 64)]


def test_two_runs_give_the_same_bits(device):
    tensors = heads_of(2, 4, 2, 3, 64, torch.float32, device) | table(2, 3, 64, dtype=torch.float32, device=device)
    assert_deterministic(partial(rotary, impl="triton"), tensors, ["q", "k"])


def test_operator_passes_opcheck(device):
    for layout in ("bshd", "bhsd", "fused"):
        tensors = heads_of(2, 4, 2, 3, 64, torch.float32, device, layout)
        positions = table(1, 2, 3, 64, dtype=torch.float32, device=device)
        for backward in (False, True):
            arguments = (*tensors.values(), *positions.values(), [], False, True, backward, torch.float32)
            torch.library.opcheck(torch.ops.fvlm.rotary.default, arguments)
    positions = table(3, 1, 3, 64, dtype=torch.float32, device=device)
    arguments = (*tensors.values(), *positions.values(), [8, 12, 12], True, True, False, torch.float32)
    torch.library.opcheck(torch.ops.fvlm.rotary.default, arguments)


def test_compiles_and_exports_as_one_graph(device):
    tensors = heads_of(2, 4, 2, 3, 64, torch.float32, device) | table(2, 3, 64, dtype=torch.float32, device=device)

    class Rotate(torch.nn.Module):
        def forward(self, q, k, cos, sin):
            q, k = rotary(q * 2, k, cos, sin, impl="triton")
            return q + 1, k

    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(Rotate(), fullgraph=True, backend=backend)
    eager, fused = (run_with_gradients(f, tensors, ["q", "k"]) for f in (Rotate(), compiled))
    for a, b in zip([*eager[0], *eager[1].values()], [*fused[0], *fused[1].values()], strict=True):
        torch.testing.assert_close(a, b)
    program = torch.export.export(Rotate(), tuple(tensors.values()))
    assert torch.equal(program.module()(*tensors.values())[0], eager[0][0])


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    q = torch.empty(1, 2**18 + 3, 64, 128, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    positions = table(1, q.shape[2], 128, dtype=torch.bfloat16, device="cuda")
    y, _ = rotary(q, q[:, :1], **positions)
    last = {n: t[:, -2:] for n, t in positions.items()}
    assert torch.equal(y[:, :, -2:], rotary(q[:, :, -2:].clone(), q[:, :1, -2:].clone(), **last)[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q, c: rotary(q, q, c[..., :63], c[..., :63]), ValueError, "R even and at most 64"),
        (lambda q, c: rotary(q, q, c[:, :2], c[:, :2]), ValueError, "it must cover 3 positions"),
        (lambda q, c: rotary(q, q[:, :, :2], c, c), ValueError, "k, its heads aside, has shape"),
        (lambda q, c: rotary(q[0], q, c, c), ValueError, "q has 3 and k 4 dimensions"),
        (lambda q, c: rotary(q, q, c, c, heads_dim=3), ValueError, "heads_dim is 3"),
        (lambda q, c: rotary(q, q.half(), c, c), TypeError, "k has torch.float16 but q has torch.float32"),
        (lambda q, c: rotary(q, q, c, c.half()), TypeError, "sin has torch.float16 but cos has torch.float32"),
        (lambda q, c: rotary(q, q, c, c[:, :, :32]), ValueError, "sin has shape"),
        (lambda q, c: rotary(q, q, c.requires_grad_(), c), ValueError, "requires a gradient"),
        (lambda q, c: vision_rotary(q[0], q[0], c, c), ValueError, r"they must be \(S, H, D\)"),
        (lambda q, c: multimodal_rotary(q, q, c, c, [8, 12, 12]), ValueError, r"\(3, B, S, R\)"),
        (
            lambda q, c: multimodal_rotary(q, q, *[c.expand(3, 2, 3, 64)] * 2, [8, 8, 8]),
            ValueError,
            "three positive counts",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call(torch.ones(2, 4, 3, 64), torch.ones(2, 3, 64))
    assert "\n" not in str(caught.value)


def test_how_many_heads_a_program_turns_at_a_time():
    assert [_heads_at_once(n) for n in (1, 2, 3, 8, 12, 16, 28, 32)] == [1, 2, 2, 8, 8, 16, 32, 32]
