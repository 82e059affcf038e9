"""Flat parameters: the same values as the parameters one by one, in every optimizer that works element by element."""

from collections import Counter

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fvlm_core.flat import BLOCK, LEAST, FlatParameters, clip_gradients, flatten

SHAPES = [(16, 300), (300, 16), (64, 64), (5000,), (16, 257)]
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "8bit": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2),
}


def parameters(shapes=SHAPES, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def give_gradients(given, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in given:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


DEVICES = [
    *[pytest.param(name, "cpu", id=name) for name in ("adamw", "sgd", "8bit")],
    *[pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in OPTIMIZERS],
]


@pytest.mark.parametrize(("name", "device"), DEVICES)
def test_steps_equal_those_of_single_parameters(name, device):
    ours, theirs = parameters(device=device), parameters(device=device)
    flat = FlatParameters(ours)
    optimizers = [OPTIMIZERS[name]([flat.parameter]), OPTIMIZERS[name](theirs)]
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        flat.gather()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if name == "8bit" else 1e-7)


def test_they_stay_views_with_their_values():
    ours, before = parameters(), parameters()
    flat = FlatParameters(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
    with torch.no_grad():
        ours[1].add_(1.0)
        flat.parameter[0] = 7.0
    assert ours[0].flatten()[0] == 7.0
    start = -(-ours[0].numel() // BLOCK) * BLOCK
    assert torch.equal(flat.parameter[start : start + ours[1].numel()].view(300, 16), ours[1])


def test_what_has_no_gradient():
    ours = parameters()
    flat = FlatParameters(ours)
    flat.gather()
    assert flat.parameter.grad is None
    give_gradients(ours, 0)
    flat.gather()
    ours[0].grad = None
    flat.gather()
    assert (flat.parameter.grad[: ours[0].numel()] == 0).all()
    assert torch.equal(flat.parameter.grad[-BLOCK * 17 :][: ours[4].numel()], ours[4].grad.flatten())


def test_a_flat_gradient_is_held_until_it_is_released():
    ours = parameters()
    flat = FlatParameters(ours)
    for step in range(2):
        assert flat.parameter.grad is None
        give_gradients(ours, step)
        before = [p.grad.clone() for p in ours]
        flat.gather()
        give_gradients(ours, 7)
        flat.scatter()
        assert all(torch.equal(p.grad, value) for p, value in zip(ours, before, strict=True))
        flat.release()
        flat.scatter()  # of nothing
        assert all(torch.equal(p.grad, value) for p, value in zip(ours, before, strict=True))


def test_clipping_equals_torchs():
    for limit in (0.5, 1e6, float("inf")):
        ours, theirs = parameters(), parameters()
        give_gradients(ours, 1)
        give_gradients(theirs, 1)
        flat = FlatParameters(ours[:3])
        flat.gather()
        norm = clip_gradients([flat.parameter, *ours[3:]], limit)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, limit))
        size = theirs[0].numel()
        torch.testing.assert_close(flat.parameter.grad[:size], theirs[0].grad.flatten())
        torch.testing.assert_close(ours[4].grad, theirs[4].grad)


class Counted(TorchDispatchMode):
    """Counts the operators that run: on a GPU each is a launch or a few."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_launches_as_much_for_many_parameters_as_for_few():
    counts = []
    for number in (4, 64):
        ours = parameters([(64, 64)] * number)
        flat = FlatParameters(ours)
        optimizer = torch.optim.AdamW([flat.parameter], lr=1e-2, fused=True)
        for step in range(2):
            give_gradients(ours, step)
            with Counted() as seen:
                flat.gather()
                clip_gradients([flat.parameter], 0.5)
                optimizer.step()
                flat.release()
        launching = {
            n: c for n, c in seen.names.items() if not any(view in n for view in ("view", "detach", "split", "slice"))
        }
        counts.append(launching)
    assert counts[0] == counts[1]
    assert 3 <= sum(counts[0].values()) < 20
    assert "aten._fused_adamw_.default" in counts[0]


def test_clipping_nothing():
    assert clip_gradients(parameters(), 1.0) == 0


def test_small_and_odd_parameters_stay_alone():
    small, big = parameters([(LEAST - 1,)]), parameters([(LEAST,), (2, LEAST)])
    half = [nn.Parameter(torch.zeros(LEAST, dtype=torch.float16))]
    crossed = [nn.Parameter(torch.zeros(100, 60).t())]
    flat, alone = flatten([*small, *big, *half, *crossed])
    assert [one.parameters for one in flat] == [big]
    assert {id(p) for p in alone} == {id(p) for p in (*small, *half, *crossed)}


def test_mixed_parameters_are_refused():
    with pytest.raises(ValueError, match="one dtype"):
        FlatParameters([*parameters([(8,)]), nn.Parameter(torch.zeros(8, dtype=torch.float64))])
    with pytest.raises(ValueError, match="at least one"):
        FlatParameters([])
