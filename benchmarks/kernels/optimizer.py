"""Cases of ``adamw_flat_``: clipping and a step over the adapters of a model, in one fp32 buffer.

The provider ``bnb`` keeps its moments in 8 bits, blockwise: it moves 20 bytes a parameter where the others move 32, and
its rate is given for those 32 all the same, so that rates compare as times do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.kernels.bench_nf4 import bitsandbytes
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


def _bnb() -> Provider | None:
    """Return clipping by the norm and bitsandbytes' blockwise step, with moments of its own for each parameter."""
    library = bitsandbytes() if torch.cuda.is_available() else None
    states: dict[int, Any] = {}

    def new_state(param: torch.Tensor) -> Any:
        maps = [library.functional.create_dynamic_map(signed=signed).to(param.device) for signed in (True, False)]
        moments = [torch.zeros_like(param, dtype=torch.uint8) for _ in range(2)]
        blocks = -(-param.numel() // 256)
        return moments, maps, [torch.zeros(blocks, device=param.device) for _ in range(2)]

    def run(param: torch.Tensor, grad: torch.Tensor, **_: torch.Tensor) -> Any:
        norm = torch.linalg.vector_norm(grad)
        grad.mul_((MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        key = param.data_ptr()
        if key not in states:
            states[key] = new_state(param)
        moments, maps, scales = states[key]
        library.functional.optimizer_update_8bit_blockwise(
            "adam", grad, param, *moments, 0.9, 0.999, 0.0, 0.0, SETTINGS["eps"], 1, SETTINGS["lr"], *maps, *scales,
            weight_decay=SETTINGS["weight_decay"],
        )  # fmt: skip
        return param

    return library and run


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

        providers: dict[str, Provider] = present(torch=_torch, bnb=_bnb(), fvlm=partial(_ours, None))
        traffic = size(n, itemsize=4) * (1 + 4 + 3)  # the norm reads once, the step reads four and writes three
        cases.append(
            Case("adamw", name, make, providers, partial(_ours, "torch"), in_place=True, recorded=False,
                 forward_bytes=traffic, shape={"parameters": n})
        )  # fmt: skip
    return cases
