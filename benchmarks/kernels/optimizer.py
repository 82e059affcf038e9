"""Cases of ``adamw_flat_``: clipping and a step over the adapters of a model, in one fp32 buffer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, Provider, normal, present, size
from torch.optim.adamw import adamw

from fvlm_kernels import adamw_flat_

ADAPTERS = {  # parameters of LoRA on attention and MLP of both towers
    "Qwen2-VL-2B, rank 16": 28_950_528,
    "Qwen2.5-VL-7B, rank 16": 51_521_536,
}
SETTINGS = {"lr": 2e-4, "weight_decay": 0.01, "eps": 1e-8}
MAX_NORM = 1.0


def _torch(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: torch.Tensor
) -> Any:
    """What clip_grad_norm_ and AdamW(fused=True) launch for one flat parameter."""
    norm = torch.nn.utils.get_total_norm([grad])
    grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    adamw(
        [param], [grad], [exp_avg], [exp_avg_sq], [], [step], fused=True, amsgrad=False, beta1=0.9, beta2=0.999,
        maximize=False, **SETTINGS,
    )  # fmt: skip
    return param, exp_avg, exp_avg_sq


def _ours(
    impl: Any, param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
) -> Any:  # fmt: skip
    norm = torch.linalg.vector_norm(grad)
    adamw_flat_(param, grad, exp_avg, exp_avg_sq, step, grad_norm=norm, max_norm=MAX_NORM, impl=impl, **SETTINGS)
    return param, exp_avg, exp_avg_sq


def adamw_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``adamw_flat_``."""
    cases = []
    for name, full in ADAPTERS.items():
        n = 100 if tiny else full

        def make(device: torch.device, n: int = n) -> Inputs:
            names = ("param", "grad", "exp_avg", "exp_avg_sq")
            drawn = {name: normal(device, n, seed=i, dtype=torch.float32) for i, name in enumerate(names)}
            return drawn | {"exp_avg_sq": drawn["exp_avg_sq"].abs(), "step": torch.zeros((), device=device)}

        providers: dict[str, Provider] = present(torch=_torch, fvlm=partial(_ours, None))
        traffic = size(n, itemsize=4) * (1 + 4 + 3)  # the norm reads once, the step reads four and writes three
        cases.append(
            Case("adamw", name, make, providers, partial(_ours, "torch"), in_place=True, forward_bytes=traffic,
                 shape={"parameters": n})
        )  # fmt: skip
    return cases
