from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fvlm_kernels import decode_attention
from fvlm_kernels.testing import assert_deterministic, check_against_reference, randn, strided

CASES = [
    pytest.param(1, 2, 2, 64, 16, 5, id="one-block"),
    pytest.param(2, 6, 2, 200, 24, 137, id="grouped-ragged"),
    pytest.param(1, 4, 1, 320, 64, 320, id="full"),
    pytest.param(4, 8, 2, 96, 256, 90, id="wide-heads"),
]


def inputs(batch, heads, kv_heads, capacity, d, dtype, device):
    q = randn(batch, heads, d, dtype=dtype, device=device)
    keys, values = (randn(batch, kv_heads, capacity, d, dtype=dtype, device=device, seed=s) for s in (1, 2))
    return {"q": q, "keys": keys, "values": values}


def check(given, length, **kwargs):
    n = torch.tensor([length], device=given["q"].device)

    def run(impl):
        return lambda q, keys, values: decode_attention(q, keys, values, n, impl=impl, **kwargs)

    check_against_reference(run("triton"), run("torch"), given)


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "capacity", "d", "length"), CASES)
def test_policy(batch, heads, kv_heads, capacity, d, length, dtype, device):
    check(inputs(batch, heads, kv_heads, capacity, d, dtype, device), length)


@pytest.mark.parametrize("window", [1, 70, 500])
def test_windows(window, device):
    check(inputs(2, 4, 2, 200, 16, torch.float32, device), 150, window=window, scale=0.3)


def test_padding(device):
    given = inputs(3, 4, 2, 200, 16, torch.float32, device)
    visible = torch.ones(3, 200, dtype=torch.bool, device=device)
    visible[0, :100] = visible[1, 3:9] = False
    check(given, 150, visible=visible)
    check(given, 150, visible=visible, window=40)


def test_what_lies_behind_the_length_is_not_read(device):
    given = inputs(2, 4, 2, 200, 16, torch.float32, device)
    given["keys"][:, :, 70:] = float("nan")
    given["values"][:, :, 70:] = float("nan")
    y = decode_attention(**given, length=torch.tensor(70, device=device), impl="triton")
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_equals_torch(impl, device):
    given = inputs(2, 6, 2, 90, 16, torch.float32, device)
    visible = torch.ones(2, 90, dtype=torch.bool, device=device)
    visible[1, :11] = False
    y = decode_attention(**given, length=torch.tensor(80, device=device), visible=visible, window=75, impl=impl)
    mask = visible & (torch.arange(90, device=device) < 80) & (torch.arange(90, device=device) >= 5)
    k, v = (given[n].repeat_interleave(3, dim=1) for n in ("keys", "values"))
    stock = scaled_dot_product_attention(given["q"].unsqueeze(2), k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(y, stock.squeeze(2), rtol=1e-5, atol=1e-5)


def test_strides_and_determinism(device):
    given = inputs(2, 4, 2, 130, 16, torch.float32, device)
    given["keys"] = given["keys"].transpose(1, 2).contiguous().transpose(1, 2)
    given["values"] = given["values"].repeat(1, 1, 2, 1)[:, :, :130]
    check(given, 101)
    n = torch.tensor(101, device=device)
    assert_deterministic(lambda **kw: decode_attention(**kw, length=n, impl="triton"), given)


def test_refusals(device):
    given, n = inputs(2, 4, 2, 64, 16, torch.float32, device), torch.tensor(3, device=device)
    with pytest.raises(ValueError, match="one integer"):
        decode_attention(**given, length=torch.tensor([1, 2], device=device))
    with pytest.raises(ValueError, match="multiple"):
        decode_attention(given["q"][:, :3], given["keys"], given["values"], n)
    with pytest.raises(ValueError, match="window is 0"):
        decode_attention(**given, length=n, window=0)
    with pytest.raises(ValueError, match="visible"):
        decode_attention(**given, length=n, visible=torch.ones(2, 3, dtype=torch.bool, device=device))
    with pytest.raises(TypeError, match="cast one"):
        decode_attention(given["q"].half(), given["keys"], given["values"], n)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("length", [1, 2, 64, 65, 137])
@pytest.mark.parametrize("window", [None, 70])
def test_a_token_of_its_own_is_kept_and_seen(length, window, impl, device):
    given = inputs(2, 6, 2, 200, 24, torch.float32, device)
    given["keys"][:, :, length - 1 :] = given["values"][:, :, length - 1 :] = 7.0
    fresh = randn(2, 2, 2, 24, dtype=torch.float32, device=device, seed=9)
    k, v = fresh[0], strided(fresh[1].transpose(0, 1)).transpose(0, 1)
    visible = torch.ones(2, 200, dtype=torch.bool, device=device)
    visible[1, : length // 2] = False
    n = torch.tensor([length], device=device)
    whole = {name: tensor.clone() for name, tensor in given.items()}
    whole["keys"][:, :, length - 1], whole["values"][:, :, length - 1] = k, v
    y = decode_attention(**given, length=n, new=(k, v), visible=visible, window=window, impl=impl)
    expected = decode_attention(**whole, length=n, visible=visible, window=window, impl="torch")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, tensor in whole.items():
        assert torch.equal(given[name], tensor), name


def test_refuses_new_ones_of_another_shape(device):
    given, n = inputs(2, 4, 2, 64, 16, torch.float32, device), torch.tensor(3, device=device)
    with pytest.raises(ValueError, match="new key"):
        decode_attention(**given, length=n, new=(given["q"], given["q"]))


def test_operators_pass_opcheck(device):
    given, n = inputs(2, 4, 2, 70, 16, torch.float32, device), torch.tensor([66], device=device)
    visible = torch.ones(2, 70, dtype=torch.bool, device=device)
    fresh = [randn(2, 2, 16, dtype=torch.float32, device=device, seed=s) for s in (7, 8)]
    ops = torch.ops.fvlm
    torch.library.opcheck(ops.decode_attention.default, (*given.values(), n, visible, 5, 0.25))
    torch.library.opcheck(ops.decode_attention_.default, (*given.values(), n, None, 0, 0.25, *fresh))


@pytest.mark.parametrize("shape", [(0, 4, 2, 64, 16), (2, 0, 2, 64, 16)], ids=str)
def test_empty(shape, device):
    given = inputs(*shape, torch.float32, device)
    for impl in ("triton", "torch"):
        assert decode_attention(**given, length=torch.tensor(3, device=device), impl=impl).shape == given["q"].shape


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    """What the last of three sequences reads and writes lies behind 2³¹ elements of its cache."""
    cache = torch.empty(2, 3, 2, 2**21 + 64, 256, dtype=torch.bfloat16, device="cuda").normal_()
    assert cache[0, :-1].numel() > 2**31
    q, fresh = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((3, 4, 256), (2, 3, 2, 256)))
    n, few = torch.tensor(40, device="cuda"), cache[:, -1:, :, :64].clone()
    y = decode_attention(q, *cache, n, new=tuple(fresh))
    expected = decode_attention(q[-1:], *few, n, new=tuple(fresh[:, -1:]), impl="torch")  # rounds its shares to bf16
    torch.testing.assert_close(y[-1:], expected, rtol=2e-2, atol=1e-2)
    assert torch.equal(cache[:, -1:, :, :64], few)
