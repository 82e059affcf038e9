"""The cross entropies against the loss of the installed transformers: alone, and at the end of whole models.

The loss is held to its value, gradients to the error policy with transformers' own as the one in the dtype under test.
On the CPU this compares the PyTorch reference, to which the package's own tests hold the kernels; on a GPU it compares
the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from fvlm_kernels import cross_entropy, linear_cross_entropy
from fvlm_kernels.testing import assert_within_policy, randn, run_with_gradients

ON_GPU = torch.cuda.is_available() or os.environ.get("FVLM_GPU") == "1"  # told of a GPU that is not there: fail
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ITEMS = {"counted": None, "number": 7, "tensor": torch.tensor(7)}


def labels_of(batch, tokens, vocabulary):
    labels = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(5))
    labels[:, : tokens // 2] = -100
    labels[0, -3:] = -100
    return labels.to(DEVICE)


def shifted(labels):
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def compare(ours, theirs, tensors):
    """Hold `ours` to `theirs`, both called with `tensors`; the truth is `theirs` in float64."""
    (low,), low_grads = run_with_gradients(theirs, tensors, list(tensors))
    (loss,), grads = run_with_gradients(ours, tensors, list(tensors))
    _, exact = run_with_gradients(theirs, {n: t.double() for n, t in tensors.items()}, list(tensors))
    assert loss.dtype == low.dtype == torch.float32
    torch.testing.assert_close(loss, low, rtol=2e-6, atol=0)
    for name in tensors:
        assert_within_policy(f"gradient of {name}", grads[name], low_grads[name], exact[name])


def their_loss(logits, labels, items):
    if logits.dtype != torch.float64:  # which theirs would round
        return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=items)
    flat = logits.flatten(0, -2), shifted(labels).flatten()
    if items is None:
        return torch.nn.functional.cross_entropy(*flat)
    return torch.nn.functional.cross_entropy(*flat, reduction="sum") / items


@every_dtype
@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
def test_cross_entropy_is_their_loss(items, dtype):
    logits, labels = randn(2, 11, 320, dtype=dtype, device=DEVICE, scale=2.0), labels_of(2, 11, 320)
    compare(
        lambda logits: cross_entropy(logits, shifted(labels), num_items=items),
        lambda logits: their_loss(logits, labels, items),
        {"logits": logits},
    )


@every_dtype
@pytest.mark.parametrize("given", [True, False], ids=["rows given", "rows found"])
@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
def test_linear_cross_entropy_is_the_head_and_their_loss(items, given, dtype):
    labels = labels_of(2, 11, 320)
    rows = (shifted(labels).flatten() != -100).nonzero().squeeze(1) if given else None
    tensors = {
        "hidden": randn(2, 11, 64, dtype=dtype, device=DEVICE, seed=1),
        "weight": randn(320, 64, dtype=dtype, device=DEVICE, seed=2, scale=0.2),
    }
    compare(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, shifted(labels), num_items=items, rows=rows),
        lambda hidden, weight: their_loss(torch.nn.functional.linear(hidden, weight), labels, items),
        tensors,
    )


SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=0.5, attn_implementation="eager")
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_at_the_end_of_a_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE)
    labels = labels_of(2, 11, 96)
    ids = labels.where(labels != -100, 3)
    theirs = model(input_ids=ids, labels=labels, num_items_in_batch=9).loss
    theirs.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    ours = linear_cross_entropy(
        model.model(input_ids=ids).last_hidden_state, model.lm_head.weight, shifted(labels), num_items=9,
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )  # fmt: skip
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-6, msg=n)
