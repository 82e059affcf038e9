"""Bad input to the cross entropies gets one sentence."""

from __future__ import annotations

import math

import pytest
import torch

from fvlm_kernels import cross_entropy, linear_cross_entropy

ROWS = torch.tensor([0, 2])
SHARED = [
    ({"labels": torch.zeros(4, dtype=torch.long)}, ValueError, r"labels has shape \(4,\); it must have shape \(3,\)"),
    ({"labels": torch.tensor([0, 8, 1])}, ValueError, r"labels hold 8; they must lie in \[0, 8\)"),
    ({"labels": torch.tensor([0, -1, 1])}, ValueError, "labels hold -1"),
    ({"labels": torch.zeros(3)}, TypeError, "labels have dtype torch.float32"),
    ({"labels": torch.zeros(3, dtype=torch.long, device="meta")}, ValueError, "labels are on meta"),
    ({"reduction": "max"}, ValueError, "reduction is 'max'"),
    ({"reduction": "sum", "num_items": 3}, ValueError, "num_items is given with reduction='sum'"),
    ({"num_items": -1}, ValueError, "num_items is -1"),
    ({"num_items": torch.ones(1)}, ValueError, r"num_items has shape \(1,\)"),
    ({"num_items": torch.tensor(1, device="meta")}, ValueError, "num_items has shape .* on meta"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
]
LOGITS = [
    ({"logits": torch.zeros(3, 8, dtype=torch.long)}, TypeError, "logits has dtype torch.int64"),
    ({"logits": torch.zeros(3, 0)}, ValueError, "last dimension"),
    ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
    ({"scale": math.nan}, ValueError, "scale is nan"),
    ({"logits": torch.zeros(3, 8, dtype=torch.float64), "impl": "triton"}, TypeError, "float64"),
]
HEAD = [
    ({"hidden": torch.zeros(3, 5)}, ValueError, r"hidden has shape \(3, 5\) and weight \(8, 4\)"),
    ({"weight": torch.zeros(8)}, ValueError, r"they must be \(\.\.\., K\) and \(V, K\)"),
    ({"hidden": torch.zeros(3, 0), "weight": torch.zeros(8, 0)}, ValueError, "last dimension"),
    ({"weight": torch.zeros(8, 4).half()}, TypeError, "weight has torch.float16 but hidden has torch.float32"),
    ({"weight": torch.zeros(8, 4, dtype=torch.int8)}, TypeError, "weight has dtype torch.int8"),
    ({"weight": torch.zeros(8, 4, device="meta")}, ValueError, "weight is on meta but hidden on cpu"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\); it must have shape \(8,\)"),
    ({"bias": torch.zeros(8).double()}, TypeError, "bias has torch.float64"),
    ({"rows": ROWS.int()}, TypeError, "rows has torch.int32 and shape"),
    ({"rows": ROWS.bool()}, TypeError, "rows has torch.bool"),
    ({"rows": ROWS.view(1, 2)}, TypeError, r"shape \(1, 2\); it must be int64 and 1-D"),
    ({"rows": torch.tensor([3])}, ValueError, "rows hold 3; hidden has 3 rows, counted from 0"),
    ({"rows": torch.tensor([-1])}, ValueError, "rows hold -1"),
    ({"rows": ROWS.to("meta")}, ValueError, "rows is on meta"),
]


def refused(op, arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        op(**arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(op.__name__) or "impl" in words or "float64" in words


@pytest.mark.parametrize(("change", "error", "words"), SHARED + LOGITS)
def test_cross_entropy(change, error, words):
    arguments = {"logits": torch.ones(3, 8), "labels": torch.tensor([1, -100, 7]), "impl": "torch"}
    refused(cross_entropy, arguments | change, error, words)


@pytest.mark.parametrize(("change", "error", "words"), SHARED + HEAD)
def test_linear_cross_entropy(change, error, words):
    arguments = {"hidden": torch.ones(3, 4), "weight": torch.ones(8, 4), "labels": torch.tensor([1, -100, 7])}
    refused(linear_cross_entropy, arguments | {"impl": "torch"} | change, error, words)
