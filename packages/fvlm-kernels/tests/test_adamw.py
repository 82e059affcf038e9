from __future__ import annotations

from functools import partial

import pytest
import torch

from fvlm_kernels import adamw_flat_
from fvlm_kernels.testing import assert_deterministic, check_against_reference, randn

SIZES = [(4096,), (2049,), (1,), (3, 700), (0,)]


def state_of(shape, dtype, device, started=True):
    moments = [randn(*shape, dtype=torch.float32, device=device, seed=i, scale=0.1) for i in (3, 4)]
    return {
        "param": randn(*shape, dtype=dtype, device=device, seed=1),
        "grad": randn(*shape, dtype=dtype, device=device, seed=2),
        "exp_avg": moments[0] if started else torch.zeros_like(moments[0]),
        "exp_avg_sq": moments[1].abs() if started else torch.zeros_like(moments[1]),
    }


def stepped(impl, taken=0, clip=None, **options):
    """The step as a function of its tensors, for the error policy."""

    def run(param, grad, exp_avg, exp_avg_sq):
        param, exp_avg, exp_avg_sq = (t.clone() for t in (param, exp_avg, exp_avg_sq))
        step = torch.tensor(float(taken), device=param.device)
        norm = None if clip is None else torch.linalg.vector_norm(grad.double())
        adamw_flat_(
            param, grad, exp_avg, exp_avg_sq, step, grad_norm=norm, max_norm=clip, impl=impl, **{"lr": 0.05} | options
        )
        assert step == taken + 1
        return param, exp_avg, exp_avg_sq

    return run


OPTIONS = {
    "first step": {},
    "later": {"taken": 12, "weight_decay": 0.3},
    "clipped": {"taken": 3, "clip": 0.5},
    "below the norm": {"taken": 3, "clip": 1e4},
    "other betas": {"taken": 1, "betas": (0.0, 0.5), "eps": 1e-2, "lr": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_policy_of_every_option(options, dtype, device):
    started = options.get("taken", 0) > 0
    tensors = state_of((2049,), dtype, device, started)
    check_against_reference(stepped("triton", **options), stepped("torch", **options), tensors)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_policy_of_every_size(shape, dtype, device):
    check_against_reference(stepped("triton", clip=1.0), stepped("torch", clip=1.0), state_of(shape, dtype, device))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_equals_torch_over_many_steps(max_norm, impl, device):
    flat = randn(300, dtype=torch.float32, device=device)
    theirs = [torch.nn.Parameter(t.clone()) for t in flat.split([100, 150, 50])]
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer, step = torch.optim.AdamW(theirs, **options), torch.zeros((), device=device)
    exp_avg, exp_avg_sq = torch.zeros_like(flat), torch.zeros_like(flat)
    for i in range(25):
        grad = randn(300, dtype=torch.float32, device=device, seed=100 + i, scale=0.5 if i % 3 else 0.02)
        for p, g in zip(theirs, grad.split([100, 150, 50]), strict=True):
            p.grad = g.clone()
        norm = None
        if max_norm is not None:
            norm = torch.linalg.vector_norm(grad)
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step()
        before = grad.clone()
        adamw_flat_(flat, grad, exp_avg, exp_avg_sq, step, **options, grad_norm=norm, max_norm=max_norm, impl=impl)
        assert torch.equal(grad, before)
    torch.testing.assert_close(flat, torch.cat([p.detach() for p in theirs]), rtol=1e-6, atol=1e-7)
    assert step == 25


def test_the_first_steps_of_a_small_beta_keep_their_digits(device):
    """1 − β₂ᵗ in fp32 would be off by 6e-5 at the first step of β₂ = 0.9999."""
    results = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "torch")):
        param, grad = torch.zeros(8, dtype=dtype, device=device), torch.full((8,), 0.1, dtype=dtype, device=device)
        moments = torch.zeros_like(param), torch.zeros_like(param)
        adamw_flat_(param, grad, *moments, torch.tensor(0, device=device), lr=1.0, betas=(0.999, 0.9999), impl=impl)
        results.append(param.double())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_a_norm_that_is_not_finite_shows(device):
    tensors = state_of((40,), torch.float32, device)
    norm, step = torch.tensor(float("nan"), device=device), torch.zeros((), device=device)
    adamw_flat_(*tensors.values(), step, lr=0.1, grad_norm=norm, max_norm=1.0, impl="triton")
    assert tensors["param"].isnan().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_tiny_norm_is_not_divided_by_alone(impl, device):
    tensors, tiny = state_of((4,), torch.float32, device, started=False), torch.tensor(1e-6, device=device)
    adamw_flat_(
        *tensors.values(),
        torch.zeros((), device=device),
        lr=0.1,
        betas=(0.0, 0.9),
        grad_norm=tiny,
        max_norm=1e-6,
        impl=impl,
    )
    torch.testing.assert_close(tensors["exp_avg"], tensors["grad"] / 2)  # 1e-6 / (1e-6 + 1e-6)


def test_nothing_behind_the_buffers_is_written(device):
    wide = {
        n: torch.cat((t, t.new_full((64,), float("nan")))) for n, t in state_of((1030,), torch.float32, device).items()
    }
    adamw_flat_(*(t[:1030] for t in wide.values()), torch.zeros((), device=device), lr=0.1, impl="triton")
    for tensor in wide.values():
        assert tensor[:1030].isfinite().all()
        assert tensor[1030:].isnan().all()


def test_two_runs_give_the_same_bits(dtype, device):
    assert_deterministic(stepped("triton", clip=1.0), state_of((2049,), dtype, device))


def test_works_on_a_parameter_and_records_no_graph(device):
    param = torch.nn.Parameter(torch.ones(8, device=device))
    param.square().sum().backward()
    moments = torch.zeros(8, device=device), torch.zeros(8, device=device)
    adamw_flat_(param, param.grad, *moments, torch.zeros((), device=device), lr=0.1, weight_decay=0.0, impl="triton")
    torch.testing.assert_close(param.detach(), torch.full((8,), 0.9, device=device))
    assert param.is_leaf


def test_operator_passes_opcheck(device):
    tensors = list(state_of((40,), torch.float32, device).values())
    step, norm = torch.tensor(3.0, device=device), torch.tensor(2.0, device=device)
    settings = (1.0, 1e-3, 0.9, 0.999, 1e-8, 0.01)
    for clip in (norm, None):
        torch.library.opcheck(torch.ops.fvlm.adamw_flat_.default, (*tensors, step, clip, *settings))


def test_compiles_as_one_graph(device):
    fn = partial(adamw_flat_, lr=0.1, max_norm=1.0, impl="triton")
    results = []
    for run in (fn, torch.compile(fn, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")):
        tensors, step = state_of((40,), torch.float32, device), torch.zeros((), device=device)
        for _ in range(2):
            run(*tensors.values(), step, grad_norm=torch.linalg.vector_norm(tensors["grad"]))
        results.append((tensors["param"], step))
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    n = 2**31 + 4099
    param = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    moments = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    adamw_flat_(param, param.clone(), *moments, torch.zeros((), device="cuda"), lr=0.5, weight_decay=0.0)
    assert (param[-4099:] == 0.5).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grad": torch.ones(7)}, ValueError, r"grad has shape \(7,\); it must have shape \(8,\)"),
        ({"grad": torch.ones(8).half()}, TypeError, "grad has torch.float16 but param has torch.float32"),
        ({"exp_avg": torch.ones(8).bfloat16()}, TypeError, "exp_avg has dtype torch.bfloat16; for parameters in"),
        ({"exp_avg_sq": torch.ones(16)[::2]}, ValueError, r"exp_avg_sq has strides \(2,\); it must be contiguous"),
        ({"param": torch.ones(8, dtype=torch.long)}, TypeError, "param has dtype torch.int64"),
        ({"step": torch.zeros(1)}, ValueError, r"step has shape \(1,\); it must have shape \(\)"),
        ({"step": torch.zeros((), device="meta")}, ValueError, "step is on meta but param on cpu"),
        ({"grad_norm": torch.zeros(1), "max_norm": 1.0}, ValueError, "grad_norm has shape"),
        ({"grad_norm": torch.tensor(1.0)}, ValueError, "max_norm is missing"),
        ({"max_norm": 1.0}, ValueError, "grad_norm is missing"),
        ({"lr": -1.0}, ValueError, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas are \(0.9, 1.0\)"),
        ({"impl": "cuda"}, ValueError, "impl is 'cuda'"),
    ],
)
def test_bad_input_gets_one_sentence_and_changes_nothing(change, error, words):
    tensors = {n: torch.ones(8) for n in ("param", "grad", "exp_avg", "exp_avg_sq")} | {"step": torch.zeros(())}
    arguments = tensors | {"lr": 0.1, "impl": "torch"} | change
    with pytest.raises(error, match=words) as caught:
        adamw_flat_(**arguments)
    assert "\n" not in str(caught.value)
    assert torch.equal(tensors["param"], torch.ones(8))
    assert tensors["step"] == 0
