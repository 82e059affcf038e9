"""The tower of Llama 3.2 Vision without its mask: values, gradients, recordings, and what falls back to stock."""

import copy

import pytest
import torch
from family_tools import TRAINED, modules_of
from fused_tools import adapted_model, recorded
from torch.nn.functional import scaled_dot_product_attention as plain_attention

from fvlm_core import flash
from fvlm_core.arch import task_model
from fvlm_core.fused import fuse_model
from fvlm_core.fused.norms import add_and_normalize, normalized
from fvlm_core.fused.tiles import kept_apart
from fvlm_core.passes import quick_attention

MASK = "transformers.models.mllama.modeling_mllama._prepare_aspect_ratio_attention_mask"


@pytest.fixture(scope="module")
def adapted(tiny):
    return adapted_model(tiny("mllama"), targets=TRAINED)


@pytest.fixture
def model(adapted):
    """A copy, unfused."""
    return copy.deepcopy(adapted)


def images(tiles, seed=0):
    """Rows of two images: one of so many tiles each, and none but the one tile that stands for no image."""
    generator = torch.Generator().manual_seed(seed)
    ids = {1: 1, 2: 2, 3: 6, 4: 8}
    mask = (torch.arange(4) < torch.tensor(tiles)[:, None]).long()
    return {
        "pixel_values": torch.randn(len(tiles), 2, 4, 3, 28, 28, generator=generator),
        "aspect_ratio_ids": torch.tensor([[ids[count], 0] for count in tiles]),
        "aspect_ratio_mask": torch.stack([mask, torch.tensor([[1, 0, 0, 0]]).expand_as(mask)], dim=1),
    }


def run(tower, given):
    """Return the tower's states and the gradients of what is trained in it."""
    tower.zero_grad()
    out = tower(**given).last_hidden_state
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert len(got[1]) == len(expected[1]) > 0
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0
        assert (got[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("tiles", [(1,), (2,), (3,), (4,), (1, 4, 2, 3)], ids=str)
def test_a_tower_of_tiles_makes_no_mask_and_the_same_states(model, tiles, monkeypatch):
    tower = task_model(model).model.vision_model
    expected = run(tower, images(tiles))
    assert "tiled_tower" in fuse_model(model).fused.values()
    monkeypatch.setattr(MASK, None)
    assert_same(run(tower, images(tiles)), expected)


def test_under_autocast_the_states_are_what_the_projector_reads(model):
    tower, given = task_model(model).model.vision_model, images((1, 3))
    with torch.autocast("cpu", torch.bfloat16):
        stock = tower(**given).last_hidden_state
        fuse_model(model)
        ours = tower(**given).last_hidden_state
    assert (stock.dtype, ours.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(ours, stock.bfloat16(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("keep_from", [1, 10**6], ids=["attention kept", "all again"])
def test_one_recording_serves_images_of_any_tiles(model, keep_from, monkeypatch):
    tower = task_model(model).model.vision_model
    batches = [images(tiles, seed) for seed, tiles in enumerate([(1, 2), (4, 3), (2, 2), (3, 1)])]
    expected = [run(tower, given) for given in batches]
    fuse_model(model)
    monkeypatch.setattr(MASK, None)
    graphs = recorded(model, "offload", keep_attention_from=keep_from)
    for given, wanted in zip(batches, expected, strict=True):
        assert_same(run(tower, given), wanted)
    layers = len(modules_of(model, "tower_block"))
    assert (graphs.recorded, graphs.replayed) == (layers, 3 * layers)


def test_only_the_intermediate_states_are_held(model):
    fuse_model(model)
    tower = task_model(model).model.vision_model
    held = []
    for encoder in (tower.transformer, tower.global_transformer):
        encoder.register_forward_hook(lambda module, args, out: held.append([s is not None for s in out.hidden_states]))
    tower(**images((1, 2)))
    assert held == [[True, True, False], [False, False]]


def test_hidden_states_that_are_asked_for_are_those_of_stock(model):
    tower = task_model(model).model.vision_model
    given = images((1, 3))
    stock = tower(**given, output_hidden_states=True)
    fuse_model(model)
    ours = tower(**given, output_hidden_states=True)
    assert len(ours.hidden_states) == len(stock.hidden_states)  # from transformers 5.24 on this tower gives none
    for state, expected in zip(ours.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(state, expected)
    torch.testing.assert_close(ours.last_hidden_state, stock.last_hidden_state)


def test_eager_attention_gets_its_mask(model):
    tower = task_model(model).model.vision_model
    tower.set_attn_implementation("eager")
    expected = run(tower, images((1, 2)))
    fuse_model(model)
    assert_same(run(tower, images((1, 2))), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 16, 20])
def test_tokens_that_are_kept_apart_give_each_other_no_weight(dtype, width):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 3, width, generator=generator).mul(4).to(dtype) for _ in range(3))
    filling = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = ~(filling[:, None, :, None] & filling[:, None, None, :])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wide = [x.transpose(1, 2) for x in kept_apart(*leaves, filling)]
    assert wide[0].shape[-1] % 16 == 0
    out = plain_attention(*wide, scale=0.3)[..., :width]
    others = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*(x.transpose(1, 2) for x in others), attn_mask=mask, scale=0.3)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, expected, **close)
    out.sum().backward()
    expected.sum().backward()
    for got, wanted in zip(leaves, others, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, **close)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "behind an addition"])
def test_a_norm_under_autocast_is_rounded_once_for_all_that_read_it(alone):
    """A tower under autocast carries fp32 from layer to layer; each linear layer would round the norm for itself."""
    generator = torch.Generator().manual_seed(0)
    norm, linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 32)
    x, residual = (torch.randn(2, 5, 64, generator=generator, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = normalized(norm, x) if alone else add_and_normalize(norm, x, residual)[0]
        expected = norm(x) if alone else norm(x + residual)
        ours, stock = linear(got), linear(expected)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected.bfloat16())
    torch.testing.assert_close(ours, stock)
    dout = torch.randn(ours.shape, generator=generator).bfloat16()
    ours, stock = (torch.autograd.grad(out, x, dout)[0] for out in (ours, stock))
    assert (ours - stock).norm() < 1e-4 * stock.norm()
    assert normalized(norm, x).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("flash_4", [True, False], ids=["flash-attn-4", "PyTorch"])
def test_on_a_gpu_heads_of_80_channels_equal_float64(flash_4, monkeypatch):
    if not flash_4:
        monkeypatch.setattr(flash, "takes", lambda *_, **__: False)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 2112, 4, 80, generator=generator).to("cuda", torch.bfloat16) for _ in range(4))
    filling = torch.stack([torch.arange(2112) % 264 > 256, torch.arange(2112) > 300]).cuda()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wide = [x.transpose(1, 2) for x in kept_apart(*leaves, filling)]
    assert not flash_4 or flash.takes(*wide[:2], causal=False), "install fvlm-core[flash]; a Hopper GPU is needed"
    out = quick_attention(*wide, causal=False, scale=80**-0.5)
    out = plain_attention(*wide, scale=80**-0.5) if out is None else out
    got = [out[..., :80], *torch.autograd.grad(out[..., :80], leaves, dout.transpose(1, 2))]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    mask = ~(filling[:, None, :, None] & filling[:, None, None, :])
    want = plain_attention(*(x.transpose(1, 2) for x in exact), attn_mask=mask, scale=80**-0.5)
    wanted = [want, *torch.autograd.grad(want, exact, dout.double().transpose(1, 2))]
    for one, expected in zip(got, wanted, strict=True):
        assert (one.double() - expected).norm() < 6e-3 * expected.norm()


@pytest.mark.gpu
def test_on_a_gpu_an_encoder_that_keeps_its_attention_between_the_passes(tiny):
    model = adapted_model(tiny("mllama"), dtype=torch.bfloat16, targets=TRAINED, device="cuda")
    fuse_model(model)
    encoder = task_model(model).model.vision_model.transformer
    generator = torch.Generator().manual_seed(0)
    x, dout = (torch.randn(2, 2080, 64, generator=generator).cuda() for _ in range(2))
    filling = (torch.arange(2080, device="cuda") % 8 > 4).expand(2, -1)
    mask = filling[:, None, :, None] & filling[:, None, None, :]
    mask = torch.zeros(mask.shape, device="cuda", dtype=torch.bfloat16).masked_fill(mask, -1e38)

    def once(**seen):
        encoder.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = encoder(leaf, **seen).last_hidden_state
        out.backward(dout)
        return [out, leaf.grad, *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]

    expected = once(attention_mask=mask)
    graphs = recorded(model, "offload", keep_attention_from=2048)
    for _ in range(3):
        got = once(filling=filling)
        assert len(got) == len(expected) > 10
        for one, wanted in zip(got, expected, strict=True):
            assert (one - wanted).norm() < 3e-2 * wanted.norm()
    assert (graphs.recorded, graphs.replayed) == (3, 6)
