"""Every op without a row: the shapes, dtypes and gradients that its PyTorch form gives, and no launch that fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_tools import OPS, called, inputs_of, wanted_of

from fvlm_kernels import dequantize_nf4
from fvlm_kernels.testing import run_with_gradients

NO_TOKENS = {"q": (2, 3, 0, 8), "k": (2, 1, 0, 8)}
NO_PATCHES = {"q": (0, 2, 8), "k": (0, 2, 8), "cos": (0, 8), "sin": (0, 8)}
NO_LABELS = {"labels": torch.zeros(0, dtype=torch.int64)}
NO_CODES = {
    "packed": torch.zeros(0, 1, dtype=torch.uint8),
    "absmax": torch.zeros(0, dtype=torch.uint8),
    "nested_absmax": torch.zeros(0),
    "code": torch.zeros(256),
    "offset": torch.zeros(()),
}
EMPTY = {  # shapes and tensors in place of those of the op's table
    "rms_norm": {"x": (0, 40), "r": (0, 40)},
    "layer_norm": {"x": (0, 40), "r": (0, 40)},
    "gelu": {"x": (0, 40)},
    "quick_gelu": {"x": (0, 40)},
    "swiglu": {"g": (0, 40), "u": (0, 40)},
    "geglu": {"g": (0, 40), "u": (0, 40)},
    "rotary": NO_TOKENS | {"cos": (0, 8), "sin": (0, 8)},
    "multimodal_rotary": NO_TOKENS | {"cos": (3, 2, 0, 8), "sin": (3, 2, 0, 8)},
    "vision_rotary": NO_PATCHES,
    "packed_vision_rotary": {"qkv": (0, 3, 2, 8), "cos": (0, 8), "sin": (0, 8)},
    "cross_entropy": {"x": (0, 20)} | NO_LABELS,
    "linear_cross_entropy": {"h": (0, 8)} | NO_LABELS,
    "dequantize_nf4": {},
    "nf4_matvec": {"x": (0, 64)},
    "dequantize_int8": {"scale": (0,), "codes": torch.zeros(0, 10, dtype=torch.int8)},
    "lora_linear": {"x": (0, 64)},
    "lora_qkv": {"x": (0, 64)},
    "lora_mlp": {"x": (0, 64)},
    "lora_decode": {"x": (0, 64)},
    "lora_decode_gated": {"x": (0, 64)},
    "decode_attention": {"q": (0, 4, 16), "keys": (0, 2, 24, 16), "values": (0, 2, 24, 16)},
    "varlen_attention": {"q": (0, 4, 16), "k": (0, 2, 16), "v": (0, 2, 16), "cu": torch.zeros(1, dtype=torch.int32)},
    "patch_embed": {"x": (0, 3, 8, 8)},
    "adamw_flat_": dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), (0,)),
}
REFUSED = {"quantize_nf4"}  # a block of nothing has no absmax; its own tests hold it to a sentence


def emptied(name):
    op, without = OPS[name], EMPTY[name]
    shapes = op.shapes | {n: value for n, value in without.items() if isinstance(value, tuple)}
    fixed = op.fixed | {n: value for n, value in without.items() if isinstance(value, torch.Tensor)}
    if name == "dequantize_nf4":
        return replace(op, call=_dequantize_nothing, fixed=NO_CODES)
    return replace(op, shapes=shapes, fixed=fixed)


def _dequantize_nothing(impl, **parts):
    return dequantize_nf4(**parts, shape=(0, 72), dtype=torch.float32, impl=impl)


def test_every_op_has_an_empty_form():
    assert set(EMPTY) | REFUSED == set(OPS)


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows(name, device):
    op = emptied(name)
    tensors = inputs_of(op, device)
    ours, theirs = (
        run_with_gradients(lambda impl=impl, **t: called(op, impl, t), tensors, wanted_of(op))
        for impl in (op.impl, "torch" if op.impl else None)
    )
    for mine, other in zip((*ours[0], *ours[1].values()), (*theirs[0], *theirs[1].values()), strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)
    for n in wanted_of(op):
        assert ours[1][n].shape == tensors[n].shape
        assert not ours[1][n].any(), n
