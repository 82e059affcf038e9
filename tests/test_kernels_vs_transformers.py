"""Each op against the module of the installed transformers that it replaces: the same rounding, gradients as exact.

Values are held to equal bits but for a small share of neighbours (`assert_same_rounding`); gradients to the error
policy, with transformers' own as the one in the dtype under test. On the CPU this compares the PyTorch reference, to
which the package's own tests hold the kernels; on a GPU it compares the kernels.
"""

from __future__ import annotations

import importlib
import os
from functools import partial

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from fvlm_kernels import (
    geglu,
    gelu,
    layer_norm,
    multimodal_rotary,
    patch_embed,
    quick_gelu,
    rms_norm,
    rotary,
    swiglu,
    vision_rotary,
)
from fvlm_kernels.testing import assert_same_rounding, assert_within_policy, randn, run_with_gradients

ON_GPU = torch.cuda.is_available() or os.environ.get("FVLM_GPU") == "1"  # told of a GPU that is not there: fail
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def compare(ours, theirs, tensors, wanted):
    """Hold `ours` to `theirs`, both called with `tensors`; the truth for gradients is `ours` in float64."""
    theirs_out, _ = run_with_gradients(theirs, tensors, [])
    cotangents = [randn(*o.shape, dtype=o.dtype, device=DEVICE, seed=70 + i) for i, o in enumerate(theirs_out)]
    low, low_grads = run_with_gradients(theirs, tensors, wanted, cotangents)
    out, grads = run_with_gradients(ours, tensors, wanted, cotangents)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    _, exact_grads = run_with_gradients(ours, exact, wanted, cotangents)
    fp32 = low[0].dtype == torch.float32
    for a, b in zip(out, low, strict=True):
        if fp32:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert_same_rounding(a, b)
    for name in wanted:
        assert_within_policy(f"gradient of {name}", grads[name], low_grads[name], exact_grads[name])


RMS_NORMS = {
    ("llama", "LlamaRMSNorm"): {},
    ("qwen2_vl", "Qwen2VLRMSNorm"): {},
    ("qwen2_5_vl", "Qwen2_5_VLRMSNorm"): {},
    ("qwen3_vl", "Qwen3VLTextRMSNorm"): {},
    ("mllama", "MllamaTextRMSNorm"): {},
    ("pixtral", "PixtralRMSNorm"): {},
    ("gemma3", "Gemma3RMSNorm"): {"rounding": "gemma", "offset": 1.0},
}


@every_dtype
@pytest.mark.parametrize(("family", "name"), RMS_NORMS)
def test_rms_norm(family, name, dtype):
    module = getattr(modeling(family), name)(320, eps=1e-5).to(DEVICE)
    tensors = {
        "x": randn(33, 320, dtype=dtype, device=DEVICE, seed=1),
        "weight": randn(320, dtype=dtype, device=DEVICE, seed=2),
    }

    def theirs(x, weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    compare(partial(rms_norm, eps=1e-5, **RMS_NORMS[family, name]), theirs, tensors, ["x", "weight"])


@every_dtype
def test_rms_norm_with_fp32_weight_under_bf16_activations(dtype):
    module = modeling("qwen2_vl").Qwen2VLRMSNorm(320).to(DEVICE)
    x = randn(5, 320, dtype=dtype, device=DEVICE)
    ours, theirs = rms_norm(x, module.weight), module(x)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@every_dtype
def test_layer_norm(dtype):
    tensors = {
        "x": randn(33, 320, dtype=dtype, device=DEVICE, seed=1) + 1,
        "weight": randn(320, dtype=dtype, device=DEVICE, seed=2),
        "bias": randn(320, dtype=dtype, device=DEVICE, seed=3),
    }
    module = nn.LayerNorm(320, eps=1e-6).to(DEVICE)

    def theirs(x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    compare(partial(layer_norm, eps=1e-6), theirs, tensors, list(tensors))


ACTIVATIONS = {"gelu": gelu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh"), "quick_gelu": quick_gelu}
GATES = {"silu": swiglu, "gelu_pytorch_tanh": geglu, "gelu": partial(geglu, approximate="none")}


@every_dtype
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, dtype):
    if name == "quick_gelu" and dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("PyTorch rounds the factor 1.702 to bf16 on the CPU only; the op rounds as the GPU does")
    compare(ACTIVATIONS[name], lambda x: ACT2FN[name](x), {"x": randn(33, 320, dtype=dtype, device=DEVICE)}, ["x"])


@every_dtype
@pytest.mark.parametrize("name", GATES)
def test_gated_activation(name, dtype):
    tensors = {n: randn(33, 320, dtype=dtype, device=DEVICE, seed=s) for n, s in (("gate", 1), ("up", 2))}
    act = ACT2FN[name]
    compare(GATES[name], lambda gate, up: act(gate) * up, tensors, ["gate", "up"])


def heads(dtype, batch=2, length=5, width=64):
    return {
        "q": randn(batch, length, 6, width, dtype=dtype, device=DEVICE, seed=1).transpose(1, 2),
        "k": randn(batch, length, 2, width, dtype=dtype, device=DEVICE, seed=2).transpose(1, 2),
    }


def angles(*shape, dtype):
    half = randn(*shape[:-1], shape[-1] // 2, dtype=torch.float32, device=DEVICE, seed=3, scale=3.0)
    both = torch.cat((half, half), dim=-1)
    return {"cos": both.cos().to(dtype), "sin": both.sin().to(dtype)}


@every_dtype
@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3"])
def test_rotary(family, dtype):
    tensors = heads(dtype) | angles(2, 5, 64, dtype=dtype)
    compare(rotary, modeling(family).apply_rotary_pos_emb, tensors, ["q", "k"])


@every_dtype
def test_rotary_of_pixtral(dtype):
    tensors = heads(dtype, batch=1) | angles(5, 64, dtype=dtype)
    compare(rotary, partial(modeling("pixtral").apply_rotary_pos_emb, unsqueeze_dim=0), tensors, ["q", "k"])


@every_dtype
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_rotary(family, dtype):
    tensors = {n: t[0].transpose(0, 1) for n, t in heads(dtype, batch=1, length=9, width=80).items()}
    tensors |= angles(9, 80, dtype=torch.float32)
    compare(vision_rotary, modeling(family).apply_rotary_pos_emb_vision, tensors, ["q", "k"])


MULTIMODAL = [
    ("qwen2_vl", "Qwen2VLRotaryEmbedding", [8, 12, 12], False),
    ("qwen2_5_vl", "Qwen2_5_VLRotaryEmbedding", [8, 12, 12], False),
    ("qwen3_vl", "Qwen3VLTextRotaryEmbedding", [12, 10, 10], True),
]


@every_dtype
@pytest.mark.parametrize(("family", "name", "sections", "interleaved"), MULTIMODAL)
def test_multimodal_rotary(family, name, sections, interleaved, dtype):
    """Rotating by three tables is what the module's recomposed table does through apply_rotary_pos_emb."""
    recompose = getattr(modeling(family), name).recomposition_frequencies
    holder = type("Holder", (), {"mrope_section": sections})()
    frequencies = randn(3, 2, 5, 32, dtype=torch.float32, device=DEVICE, seed=3, scale=3.0)
    tables = {"cos": frequencies.cos().to(dtype), "sin": frequencies.sin().to(dtype)}

    def theirs(q, k, cos, sin):
        joined = (recompose(holder, table.clone()) for table in (cos, sin))  # Qwen3-VL's writes into its argument
        return modeling(family).apply_rotary_pos_emb(q, k, *joined)

    ours = partial(multimodal_rotary, sections=sections, interleaved=interleaved)
    compare(ours, theirs, heads(dtype) | tables, ["q", "k"])


@every_dtype
def test_patch_embed_of_qwen2_vl(dtype):
    module = modeling("qwen2_vl").PatchEmbed(embed_dim=64).to(DEVICE, dtype)
    x = randn(9, 1176, dtype=dtype, device=DEVICE)
    ours = patch_embed(x.view(-1, 3, 2, 14, 14), module.proj.weight).view(-1, 64)
    theirs = module(x)
    exact = torch.nn.functional.linear(x.double(), module.proj.weight.double().flatten(1))
    assert_within_policy("patches", ours, theirs, exact)


@every_dtype
def test_patch_embed_of_siglip(dtype):
    conv = nn.Conv2d(3, 64, kernel_size=14, stride=14, padding="valid").to(DEVICE, dtype)
    x = randn(2, 3, 56, 42, dtype=dtype, device=DEVICE)
    theirs = conv(x).flatten(2).transpose(1, 2)  # SiglipVisionEmbeddings
    ours = patch_embed(x, conv.weight, conv.bias).flatten(1, -2)
    exact = patch_embed(x.double(), conv.weight.double(), conv.bias.double()).flatten(1, -2)
    assert_within_policy("patches", ours, theirs, exact)
