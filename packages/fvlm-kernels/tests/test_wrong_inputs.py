"""Every tensor of every op in a wrong dtype, on another device, in other shapes: a sentence, or a result by intent."""

from __future__ import annotations

import pytest
import torch
from op_tools import OPS, called, inputs_of

CHANGES = {
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "int64": lambda t: t.long(),
    "elsewhere": lambda t: t.to("meta"),
    "narrower": lambda t: t[..., :-1],
    "wider": lambda t: torch.cat([t, t[..., :1]], -1),
    "fewer rows": lambda t: t[:-1],
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
}
SHAPES = {"narrower", "wider", "fewer rows", "one dimension more", "one dimension less"}
ROWS = {"fewer rows", "one dimension more", "one dimension less"}
CODES = {"packed": {"one dimension more"}, "offset": {"one dimension more"}}  # any layout of the codes; one number
TAKEN = {  # what is right as well: any shape, any number of rows, any vocabulary
    "gelu": {"x": SHAPES},
    "quick_gelu": {"x": SHAPES},
    "quantize_nf4": {"x": SHAPES},
    "dequantize_nf4": CODES,
    "nf4_matvec": {"x": ROWS} | CODES,
    "dequantize_int8": {"codes": {"narrower", "wider"}},
    "lora_linear": {"x": ROWS} | CODES,
    "lora_qkv": {"x": ROWS} | CODES,
    "lora_mlp": {"x": ROWS} | CODES,
    "lora_decode": {"x": ROWS} | CODES,
    "lora_decode_gated": {"x": ROWS} | CODES,
    "packed_vision_rotary": {"qkv": {"wider"}},  # the channels behind the table's are copied
    "cross_entropy": {"x": {"narrower", "wider"}},
    "decode_attention": {"length": {"one dimension more"}},
    "varlen_attention": {"cu": {"int64"}},
    "patch_embed": {"x": {"narrower", "wider", "fewer rows"}, "w": {"narrower", "wider"}},
    "adamw_flat_": {"step": {"int64"}},
}
LEADS = {"gelu": "x", "quick_gelu": "x", "quantize_nf4": "x", "cross_entropy": "x"}  # says where the op runs
LEFT_OUT = {"adamw_flat_": {"grad", "exp_avg_sq"}}  # the call here computes with them before the op sees them


def changed(tensor):
    """Yield the changes that make something else of a tensor."""
    for what, change in CHANGES.items():
        if what in SHAPES and what != "one dimension more" and not tensor.dim():
            continue
        new = change(tensor)
        if (new.dtype, new.shape, new.device.type) != (tensor.dtype, tensor.shape, tensor.device.type):
            yield what, new


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("name", OPS)
def test_a_wrong_tensor_gets_one_sentence(name, impl, device):
    op = OPS[name]
    if op.impl != "triton":
        impl = op.impl
    tensors, tried = inputs_of(op, device), 0
    for argument in tensors.keys() - LEFT_OUT.get(name, set()):
        for what, wrong in changed(tensors[argument]):
            if what in TAKEN.get(name, {}).get(argument, set()):
                with torch.no_grad():
                    called(op, impl, tensors | {argument: wrong})
                continue
            if LEADS.get(name) == argument and what == "elsewhere":
                continue
            with torch.no_grad(), pytest.raises((ValueError, TypeError)) as caught:
                called(op, impl, tensors | {argument: wrong})
            assert "\n" not in str(caught.value), (argument, what)
            assert ":" in str(caught.value) or "impl is" in str(caught.value), (argument, what, str(caught.value))
            tried += 1
    assert tried >= 2
