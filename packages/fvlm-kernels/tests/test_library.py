from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fvlm_kernels import LoRALinear, gelu, layer_norm, lora_linear, lora_mlp, rms_norm, rotary, swiglu

X, WEIGHT = torch.randn(2, 8), torch.ones(8)
A, B = torch.randn(2, 8), torch.randn(8, 2)


def adapted(x):
    return LoRALinear(*(t.to(x.device) for t in (torch.eye(8), A, B)))


OPS = {
    "rms_norm": lambda x, impl: rms_norm(x, WEIGHT.to(x.device), impl=impl),
    "add_rms_norm": lambda x, impl: rms_norm(x, WEIGHT.to(x.device), residual=x, impl=impl)[0],
    "layer_norm": lambda x, impl: layer_norm(x, WEIGHT.to(x.device), impl=impl),
    "gelu": lambda x, impl: gelu(x, impl=impl),
    "swiglu": lambda x, impl: swiglu(x, x, impl=impl),
    "lora_linear": lambda x, impl: lora_linear(x, adapted(x), impl=impl),
    "lora_mlp": lambda x, impl: lora_mlp(x, adapted(x), adapted(x), adapted(x), impl=impl),
    "rotary": lambda x, impl: rotary(*[x.view(1, 1, 2, 8)] * 2, *[torch.ones(2, 8, device=x.device)] * 2, impl=impl)[0],
}


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_refused_and_not_silently_wrong(name, device):
    x = X.clone().to(device).requires_grad_()
    y = OPS[name](x, "triton")
    with pytest.raises(NotImplementedError, match=r"create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_gradient(name, reentrant, device):
    x = X.clone().to(device).requires_grad_()
    (plain,) = torch.autograd.grad(OPS[name](x, "triton").pow(2).sum(), x)
    y = torch.utils.checkpoint.checkpoint(lambda t: OPS[name](t, "triton"), x, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    assert torch.equal(x.grad, plain)


def test_every_operator_is_held_to_opcheck():
    """Each operator that is registered stands in a test file that calls `opcheck`, as one of its arguments."""
    registered = {name.removeprefix("fvlm::") for name in torch._C._dispatch_get_all_op_names() if "fvlm::" in name}
    checked: set[str] = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        if "opcheck(" in text and file != Path(__file__):
            checked |= set(re.findall(r"\bops\.(?:fvlm\.)?(\w+)\.default", text))
    assert registered
    assert registered <= checked
