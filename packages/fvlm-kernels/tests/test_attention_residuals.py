from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fvlm_kernels import AttentionResiduals, attention_from_residuals, attention_with_residuals
from fvlm_kernels.testing import randn


def inputs(device, dtype, shape=(2, 3, 70, 16), keys=None):
    """Queries, keys and values as they come out of a fused projection: tokens before heads in memory."""
    batch, heads, tokens, width = shape
    made = []
    for seed, length in enumerate((tokens, keys or tokens, keys or tokens)):
        x = randn(batch, length, heads, width, dtype=dtype, device=device, seed=seed)
        made.append(x.transpose(1, 2).requires_grad_())
    return made


def assert_same_bits(q, k, v, **keywords):
    expected = scaled_dot_product_attention(
        q, k, v, is_causal=keywords.get("causal", False), scale=keywords.get("scale")
    )
    dy = randn(*expected.shape, dtype=q.dtype, device=q.device, seed=9)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dy)
    residuals = attention_with_residuals(q.detach(), k.detach(), v.detach(), **keywords)
    assert residuals is not None
    copied = AttentionResiduals(residuals.backend, residuals.out.clone(), residuals.logsumexp.clone())
    out = attention_from_residuals(q, k, v, copied, **keywords)
    assert torch.equal(out, expected)
    for name, a, b in zip("qkv", torch.autograd.grad(out, (q, k, v), dy), expected_grads, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_both_halves_give_the_bits_of_sdpa_on_a_cpu(causal, scale):
    assert_same_bits(*inputs("cpu", torch.float32), causal=causal, scale=scale)
    assert_same_bits(
        *inputs("cpu", torch.float32, (1, 2, 33, 80), keys=None if causal else 20), causal=causal, scale=scale
    )


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 72, 80, 128])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_both_halves_are_sdpa_on_a_gpu(backend, width):
    q, k, v = inputs("cuda", torch.bfloat16, (2, 4, 640, width))
    with sdpa_kernel(backend):
        expected = scaled_dot_product_attention(q, k, v)
        dy = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (q, k, v), dy)
        residuals = attention_with_residuals(q.detach(), k.detach(), v.detach())
    assert residuals is not None
    assert residuals.backend == ("flash" if backend is SDPBackend.FLASH_ATTENTION else "cudnn")
    out = attention_from_residuals(q, k, v, residuals)
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), dy), wanted, strict=True):  # dQ is added up in no fixed order
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


def test_the_second_half_reads_the_known_result():
    q, k, v = inputs("cpu", torch.float32)
    residuals = attention_with_residuals(q.detach(), k.detach(), v.detach())
    assert residuals is not None
    other = AttentionResiduals(residuals.backend, residuals.out + 1, residuals.logsumexp)
    assert torch.equal(attention_from_residuals(q, k, v, other), residuals.out + 1)


@pytest.mark.parametrize("shape", [(2, 3, 70, 136), (2, 3, 0, 16)], ids=str)
def test_what_has_no_halves_is_none(shape):
    assert attention_with_residuals(*(x.detach() for x in inputs("cpu", torch.float32, shape))) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :1], v[:, :1]), "must be"),
        (lambda q, k, v: (q, k, v[:, :, :5]), "v has shape"),
        (lambda q, k, v: (q[0], k, v), "must be"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        attention_with_residuals(*change(*(x.detach() for x in inputs("cpu", torch.float32))))


def test_wrong_dtypes_are_refused():
    q, k, v = (x.detach() for x in inputs("cpu", torch.float32))
    with pytest.raises(TypeError, match="k has"):
        attention_with_residuals(q, k.half(), v)
    residuals = attention_with_residuals(q, k, v)
    with pytest.raises(ValueError, match=r"residuals.out has shape"):
        attention_from_residuals(q, k, v, residuals._replace(out=residuals.out[:1]))
