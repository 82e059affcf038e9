"""Every kind of fused layer by itself, in every family that has it: in bf16 no further from fp64 than twice stock's.

A layer gets what it got in a step of the whole model in bf16; fp64 computes with the same numbers.
"""

import copy

import pytest
import torch
from family_tools import FAMILIES, TRAINED, family_batch
from fused_tools import QWEN, adapted_model, make_batch

from fvlm_core.arch import plain_modules
from fvlm_core.fused import fuse_model
from fvlm_core.fused.kinds import kind_of
from fvlm_core.fused.table import LAYERS

WHOLE = {name for name in LAYERS if name.endswith("_model")} | {"checkpointed_encoder", "tiled_tower", "packed_tower"}
"""Kinds that are not layers but loops over them: the tests of whole models have those."""
ROUNDING = 2.0**-9
"""Of one number to bfloat16: where stock is nearer, as a convolution is, a sum in another order is as right."""


def met_in_a_step(model, batch, names):
    """Name of a module → the arguments of its first call in a forward pass."""
    found, handles = {}, []
    for name, module in plain_modules(model):
        if name in names:

            def note(module, args, kwargs, name=name):
                found.setdefault(name, (args, kwargs))

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def cast(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return tuple(cast(part, dtype) for part in value)
    return value


def run(module, met, dtype):
    """Result and gradients of one layer, in fp64."""
    args, kwargs = cast(met[0], dtype), {name: cast(value, dtype) for name, value in met[1].items()}
    inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()][:1]
    for value in inputs:
        value.requires_grad_(True)
    module.zero_grad()
    out = module(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out.backward(seed.to(out.dtype))
    grads = {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}
    return out.detach().double(), {f"input {n}": v.grad.double() for n, v in enumerate(inputs)} | grads


def errors(found, truth):
    """Of the result, and of all gradients together."""
    assert set(found[1]) == set(truth[1]) != set()
    off = torch.stack([(found[1][name] - g).norm() / g.norm().clamp(min=1e-30) for name, g in truth[1].items()])
    return (found[0] - truth[0]).norm() / truth[0].norm(), off.square().mean().sqrt()


@pytest.fixture(scope="module", params=(*QWEN, *FAMILIES))
def layers(request, tiny):
    """A model's batch, itself in bf16 without and with fused layers, and in fp64."""
    low = adapted_model(tiny(request.param), dtype=torch.bfloat16, targets=TRAINED)
    batch = make_batch(low.config) if request.param in QWEN else family_batch(tiny(request.param), low)
    fused = copy.deepcopy(low)
    fuse_model(fused)
    return batch, low, fused, copy.deepcopy(low).double()


def test_each_kind_alone(layers):
    batch, low, fused, exact = layers
    kinds = {}
    for name, module in plain_modules(fused):
        if kind_of(module) is not None and kind_of(module) not in WHOLE:
            kinds.setdefault((kind_of(module), type(module).__name__), name)
    assert len(kinds) >= 6
    met = met_in_a_step(low, batch, set(kinds.values()))
    assert set(met) == set(kinds.values())
    stocks, ours, exacts = (dict(plain_modules(model)) for model in (low, fused, exact))
    for kind, name in kinds.items():
        truth = run(exacts[name], met[name], torch.float64)
        stock = errors(run(stocks[name], met[name], torch.bfloat16), truth)
        found = errors(run(ours[name], met[name], torch.bfloat16), truth)
        for what, mine, theirs in zip(("result", "gradients"), found, stock, strict=True):
            assert mine <= max(2 * theirs, ROUNDING), (kind, what, float(mine), float(theirs))
