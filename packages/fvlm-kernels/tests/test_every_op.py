"""What every op holds alike: two runs give the same bits, one graph under `torch.compile`, `torch.export`, autocast."""

from __future__ import annotations

import pytest
import torch
from op_tools import ELSEWHERE, OPS, READS_ON_THE_HOST, called, flat, inputs_of, wanted_of

import fvlm_kernels as ops
from fvlm_kernels.testing import assert_deterministic, run_with_gradients

every_op = pytest.mark.parametrize("name", OPS)
traceable = pytest.mark.parametrize("name", sorted(OPS.keys() - READS_ON_THE_HOST))


def test_no_op_is_forgotten():
    functions = {n for n in ops.__all__ if callable(getattr(ops, n)) and not isinstance(getattr(ops, n), type)}
    assert functions == set(OPS) | ELSEWHERE


@every_op
def test_two_runs_give_the_same_bits(name, device):
    op = OPS[name]
    assert_deterministic(lambda **t: called(op, op.impl, t), inputs_of(op, device), wanted_of(op))


@traceable
def test_compiles_as_one_graph(name, device):
    op, tensors = OPS[name], inputs_of(OPS[name], device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **t: called(op, op.impl, t), fullgraph=True, backend="aot_eager")
    plain, compiled = (run_with_gradients(fn, tensors, wanted_of(op)) for fn in (
        lambda **t: called(op, op.impl, t), compiled,
    ))  # fmt: skip
    for ours, expected in zip((*compiled[0], *compiled[1].values()), (*plain[0], *plain[1].values()), strict=True):
        torch.testing.assert_close(ours, expected)


@traceable
def test_exports(name, device):
    op, tensors = OPS[name], inputs_of(OPS[name], device)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return called(op, op.impl, tensors)

    program = torch.export.export(Module(), (tensors,))
    for ours, expected in zip(
        flat(program.module()(tensors)), flat(called(op, op.impl, tensors)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(ours, expected)


@every_op
def test_autocast_gives_what_the_reference_gives(name, device):
    """Same dtypes and values as the PyTorch form under the same autocast, whose gradients stay those of its inputs."""
    op, tensors = OPS[name], inputs_of(OPS[name], device)
    results = []
    for impl in (op.impl, "torch" if op.impl else None):
        with torch.autocast(device.type, dtype=torch.float16):
            results.append(run_with_gradients(lambda impl=impl, **t: called(op, impl, t), tensors, wanted_of(op)))
    for ours, expected in zip(results[0][0], results[1][0], strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=5e-3, atol=5e-3)
    for n in wanted_of(op):
        assert results[0][1][n].dtype == torch.float32
        torch.testing.assert_close(results[0][1][n], results[1][1][n], rtol=2e-2, atol=2e-2)
