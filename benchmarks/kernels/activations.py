"""Cases of ``swiglu``, ``geglu``, ``gelu`` and ``quick_gelu``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, Provider, liger, normal, present, size

from fvlm_kernels import geglu, gelu, quick_gelu, swiglu

functional: Any = torch.nn.functional
GATED = {
    "Qwen2-VL-2B text, ocr": ("swiglu", 1036, 8960),
    "Qwen2-VL-2B text, doc": ("swiglu", 7788, 8960),
    "Qwen2.5-VL-7B text, doc": ("swiglu", 7788, 18944),
    "Qwen2.5-VL-7B vision, doc": ("swiglu", 20480, 3420),
    "Llama-3.2-11B-Vision text": ("swiglu", 8192, 14336),
    "Gemma 3 4B text": ("geglu", 8192, 10240),
}
PLAIN = {
    "Qwen2-VL-2B vision, ocr": ("quick_gelu", 2592, 5120),
    "Qwen2-VL-2B vision, doc": ("quick_gelu", 20480, 5120),
    "Gemma 3 4B vision": ("gelu_tanh", 16384, 4304),
    "Llama-3.2-11B-Vision vision": ("gelu", 25632, 5120),
}


def _hf_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = functional.silu(gate) * up
    return y


def _hf_geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = functional.gelu(gate, approximate="tanh") * up
    return y


def _hf_quick(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _positional(fn: Provider | None) -> Provider | None:
    return fn and (lambda gate, up: fn(gate, up))


def gated_cases(tiny: bool) -> list[Case]:
    """Return the cases of the gated activations."""
    eager: dict[str, Provider] = {"swiglu": _hf_swiglu, "geglu": _hf_geglu}
    ours: dict[str, Provider] = {"swiglu": swiglu, "geglu": geglu}
    cases = []
    for name, (op, rows, width) in GATED.items():
        m, n = (4, width // 16) if tiny else (rows, width)

        def make(device: torch.device, m: int = m, n: int = n) -> Inputs:
            return {"gate": normal(device, m, n), "up": normal(device, m, n, seed=1)}

        providers = present(
            torch=eager[op], compile=torch.compile(eager[op]), liger=_positional(liger(f"liger_{op}")), fvlm=ours[op]
        )
        cases.append(
            Case(
                op, name, make, providers, partial(ours[op], impl="torch"), ["gate", "up"],
                forward_bytes=size(3, m, n), backward_bytes=size(5, m, n), shape={"rows": m, "width": n},
            )
        )  # fmt: skip
    return cases


def plain_cases(tiny: bool) -> list[Case]:
    """Return the cases of the activations without a gate."""
    eager: dict[str, Provider] = {
        "gelu": lambda x: functional.gelu(x),
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "quick_gelu": _hf_quick,
    }
    ours: dict[str, Provider] = {
        "gelu": gelu,
        "gelu_tanh": partial(gelu, approximate="tanh"),
        "quick_gelu": quick_gelu,
    }
    cases = []
    for name, (op, rows, width) in PLAIN.items():
        m, n = (4, width // 16) if tiny else (rows, width)

        def make(device: torch.device, m: int = m, n: int = n) -> Inputs:
            return {"x": normal(device, m, n)}

        providers = present(torch=eager[op], compile=torch.compile(eager[op]), fvlm=ours[op])
        cases.append(
            Case(
                "gelu", f"{name}, {op}", make, providers, partial(ours[op], impl="torch"), ["x"],
                forward_bytes=size(2, m, n), backward_bytes=size(3, m, n), shape={"rows": m, "width": n},
            )
        )  # fmt: skip
    return cases
