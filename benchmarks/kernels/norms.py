"""Cases of ``rms_norm`` and ``layer_norm``, alone and with the residual addition, with frozen and trained weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, Provider, liger, normal, present, size

from fvlm_kernels import layer_norm, rms_norm

RMS = {  # model: rows, width, rounding
    "Qwen2-VL-2B text, ocr": (1036, 1536, "llama"),
    "Qwen2-VL-2B text, doc": (7788, 1536, "llama"),
    "Qwen2.5-VL-7B text, doc": (7788, 3584, "llama"),
    "Qwen2.5-VL-7B vision, doc": (20480, 1280, "llama"),
    "Llama-3.2-11B-Vision text": (8192, 4096, "llama"),
    "Gemma 3 4B text": (8192, 2560, "gemma"),
    "Gemma 3 4B head norm": (65536, 256, "gemma"),
}
LAYER = {
    "Qwen2-VL-2B vision, ocr": (2592, 1280),
    "Qwen2-VL-2B vision, doc": (20480, 1280),
    "Gemma 3 4B vision": (16384, 1152),
    "Llama-3.2-11B-Vision vision": (25632, 1280),
}
THOROUGH = ("Qwen2.5-VL-7B text, doc", "Qwen2-VL-2B vision, doc")  # also with a residual, and with trained weights


def hf_llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What LlamaRMSNorm and the Qwen norms launch."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def hf_gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What Gemma3RMSNorm launches."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + weight.float())).type_as(x)


def hf_layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What torch.nn.LayerNorm launches."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def with_residual(norm: Provider) -> Provider:
    """Add first, then normalize, as a decoder layer does."""

    def both(x: torch.Tensor, residual: torch.Tensor, **rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + residual
        return norm(h, **rest), h

    return both


def _cases(
    op: str,
    name: str,
    rows: int,
    width: int,
    eager: Provider,
    ours: Any,
    *,
    biased: bool,
    theirs: Provider | None,
    their_sum: Provider | None = None,
) -> list[Case]:
    """Return the cases of one norm at one shape; ``theirs`` is Liger's norm, ``their_sum`` its norm of a sum."""

    def make(device: torch.device) -> Inputs:
        tensors = {"x": normal(device, rows, width), "weight": normal(device, width, seed=1)}
        return tensors | ({"bias": normal(device, width, seed=2)} if biased else {})

    def make_residual(device: torch.device) -> Inputs:
        return make(device) | {"residual": normal(device, rows, width, seed=3)}

    def case(suffix: str, make: Any, providers: dict[str, Provider], wanted: Sequence[str], *bytes_: int) -> Case:
        return Case(
            op=op,
            name=name + suffix,
            make=make,
            providers=providers,
            reference=partial(ours, impl="torch"),
            wanted=wanted,
            forward_bytes=bytes_[0],
            backward_bytes=bytes_[1],
            shape={"rows": rows, "width": width},
        )

    row = size(rows, width)
    alone = present(torch=eager, compile=torch.compile(eager), liger=theirs, fvlm=ours)
    cases = [case("", make, alone, ["x"], 2 * row, 3 * row)]
    if name in THOROUGH:
        trained = ["x", "weight", "bias"] if biased else ["x", "weight"]
        cases.append(case(", weight trained", make, alone, trained, 2 * row, 3 * row))
        fused = with_residual(eager)
        both = present(torch=fused, compile=torch.compile(fused), liger=their_sum, fvlm=ours)
        cases.append(case(", residual", make_residual, both, ["x", "residual"], 4 * row, 4 * row))
    return cases


def rms_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``rms_norm``."""
    fn, fn_of_sum = liger("liger_rms_norm"), liger("liger_fused_add_rms_norm")
    cases = []
    for name, (rows, width, rounding) in RMS.items():
        offset = 1.0 if rounding == "gemma" else 0.0
        theirs = None if fn is None else partial(_liger_rms, fn=fn, offset=offset, rounding=rounding)
        their_sum = None if fn_of_sum is None else partial(_liger_sum, fn=fn_of_sum, offset=offset, rounding=rounding)
        ours = partial(rms_norm, offset=offset, rounding=rounding)
        eager = hf_gemma if rounding == "gemma" else hf_llama
        m, n = (4, width // 16) if tiny else (rows, width)
        cases += _cases("rms_norm", name, m, n, eager, ours, biased=False, theirs=theirs, their_sum=their_sum)
    return cases


def _liger_rms(x: torch.Tensor, weight: torch.Tensor, fn: Provider, offset: float, rounding: str) -> Any:
    return fn(x, weight, 1e-6, offset, rounding, False)  # not in place: the backward pass is timed many times over


def _liger_sum(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, fn: Provider, offset: float, rounding: str
) -> Any:
    return fn(x, residual, weight, 1e-6, offset, rounding, False)


def layer_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``layer_norm``."""
    fn = liger("liger_layer_norm")
    theirs = None if fn is None else lambda x, weight, bias: fn(x, weight, bias, 1e-6)
    cases = []
    for name, (rows, width) in LAYER.items():
        m, n = (4, width // 16) if tiny else (rows, width)
        cases += _cases("layer_norm", name, m, n, hf_layer, partial(layer_norm, eps=1e-6), biased=True, theirs=theirs)
    return cases
