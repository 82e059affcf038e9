"""The LoRA ops against PEFT around plain, NF4 and int8 linear layers, on the same tensors and the same seed."""

from __future__ import annotations

from contextlib import nullcontext

import bitsandbytes as bnb
import peft
import pytest
import torch

from fvlm_kernels import Int8Weight, LoRALinear, NF4Weight, lora_linear, lora_mlp, lora_qkv

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IN, OUT, WIDE = 128, 64, 192


def linear(kind, out_features, in_features, dtype, device, compute_dtype=None):
    plain = torch.nn.Linear(in_features, out_features, dtype=dtype)
    if kind == "plain":
        return plain.to(device)
    if kind == "nf4":
        made = bnb.nn.Linear4bit(in_features, out_features, compute_dtype=compute_dtype or dtype, quant_type="nf4")
    else:
        made = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False, threshold=0.0)
    made.load_state_dict(plain.state_dict())
    made.bias.data = made.bias.data.to(dtype)
    return made.to(device)


class Block(torch.nn.Module):
    def __init__(self, kind, dtype, device, compute_dtype=None):
        super().__init__()
        shapes = {"q": (OUT, IN), "k": (32, IN), "gate": (WIDE, IN), "up": (WIDE, IN), "down": (IN, WIDE)}
        for name, shape in shapes.items():
            self.add_module(name, linear(kind, *shape, dtype, device, compute_dtype))
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = kind == "nf4", kind == "int8"

    def forward(self, x):
        return self.q(x), self.k(x), self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def model_of(kind, dtype=torch.float32, device="cpu", adapter_dtype=torch.float32, dropout=0.0, compute_dtype=None):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", lora_dropout=dropout)
    config.target_modules = ["q", "k", "gate", "up", "down"]
    model = peft.get_peft_model(Block(kind, dtype, device, compute_dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.1).to(device, adapter_dtype)
    return model.train(), model.base_model.model


def ours_of(layer, dtype):
    """The layer that PEFT wrapped, as the ops take it."""
    base = layer.get_base_layer()
    if isinstance(base, bnb.nn.Linear4bit):
        state = base.weight.quant_state
        nested = (state.state2.absmax, state.state2.code, state.offset)
        weight = NF4Weight(base.weight.data, state.absmax, tuple(state.shape), state.dtype, state.blocksize, *nested)
    elif isinstance(base, bnb.nn.Linear8bitLt):
        codes = base.weight.data if base.state.CB is None else base.state.CB
        weight = Int8Weight(codes, base.weight.SCB if base.state.SCB is None else base.state.SCB, dtype)
    else:
        weight = base.weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropout = layer.lora_dropout["default"]
    p = dropout.p if isinstance(dropout, torch.nn.Dropout) else 0.0
    return LoRALinear(weight, a, b, layer.scaling["default"], base.bias, p)


def both(kind, dtype, device, autocast=None, compute_dtype=None, dropout=0.0, adapter_dtype=torch.float32):
    """Outputs and gradients of PEFT's block and of ours."""
    model, block = model_of(kind, dtype, device, adapter_dtype, dropout, compute_dtype)
    x = torch.randn(3, 7, IN, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]

    def fused(x):
        made = {n: ours_of(getattr(block, n), dtype) for n in ("q", "k", "gate", "up", "down")}
        q, k = lora_qkv(x, [made["q"], made["k"]], compute_dtype=compute_dtype)
        return q, k, lora_mlp(x, made["gate"], made["up"], made["down"], compute_dtype=compute_dtype)

    results = []
    for run in (model, fused):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        with torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            outputs = run(leaf)
        cotangents = [torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).to(o) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, [leaf, *trained], cotangents)])
    return results


def close(ours, theirs, rtol):
    assert ours.dtype == theirs.dtype
    scale = theirs.float().abs().max()
    assert (ours.float() - theirs.float()).abs().max() <= rtol * scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "nf4", "int8"])
def test_fp32_equals_peft(kind, device):
    if kind == "int8" and device == "cuda":
        pytest.skip("on a GPU bitsandbytes rounds the activations of 8-bit layers to int8")
    for theirs, ours in zip(*both(kind, torch.float32, device), strict=True):
        close(ours, theirs, 1e-6 if device == "cpu" else 1e-3)  # a GPU's bitsandbytes may use TF32 units


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_equals_peft_within_rounding(kind, dtype, device):
    for theirs, ours in zip(*both(kind, dtype, device, autocast=torch.bfloat16), strict=True):
        close(ours, theirs, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_without_autocast_equals_peft_within_rounding(adapter_dtype, device):
    for theirs, ours in zip(*both("nf4", torch.bfloat16, device, adapter_dtype=adapter_dtype), strict=True):
        close(ours, theirs, 4 * torch.finfo(torch.bfloat16).eps)


def test_compute_dtype_is_bitsandbytes():
    for theirs, ours in zip(*both("nf4", torch.float32, "cpu", compute_dtype=torch.bfloat16), strict=True):
        close(ours, theirs, 4 * torch.finfo(torch.bfloat16).eps)


def test_dropout_of_one_layer_draws_as_peft_does():
    _, block = model_of("nf4", dropout=0.4)
    x = torch.randn(5, IN, requires_grad=True)
    torch.manual_seed(4)
    theirs = block.q(x)
    torch.manual_seed(4)
    ours = lora_linear(x, ours_of(block.q, torch.float32))
    close(ours, theirs, 1e-6)
    leaves = [x, block.q.lora_A["default"].weight, block.q.lora_B["default"].weight]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, theirs)), strict=True):
        close(a, b, 1e-6)


def test_dropout_of_layers_that_share_their_input_draws_as_peft_does():
    for theirs, ours in zip(*both("plain", torch.float32, "cpu", dropout=0.4), strict=True):
        close(ours, theirs, 1e-6)
