"""Cases of the ops on quantized weights: bound by memory, and without a gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.kernels.case import Case, Inputs, Kept, Provider, normal, present, size

from fvlm_kernels import dequantize_int8, dequantize_nf4, nf4_matvec, quantize_nf4
from fvlm_kernels.nf4 import dequantize_weight

WEIGHTS = {  # (out_features, in_features)
    "Qwen2-VL-2B text q_proj": (1536, 1536),
    "Qwen2-VL-2B text gate_proj": (8960, 1536),
    "Qwen2-VL-2B text down_proj": (1536, 8960),
    "Qwen2.5-VL-7B text q_proj": (3584, 3584),
    "Qwen2.5-VL-7B text gate_proj": (18944, 3584),
    "Llama-3.2-11B-Vision text down_proj": (4096, 14336),
    "Gemma 3 4B text gate_proj": (10240, 2560),
}


def nf4_inputs(device: torch.device, n: int, k: int, seed: int = 0) -> Inputs:
    """Return the tensors of a random weight in NF4 with nested absmaxes."""
    w = quantize_nf4(normal(device, n, k, seed=seed) * k**-0.5)
    parts = dict(zip(("packed", "absmax", "nested_absmax", "code", "offset"), w.parts, strict=True))
    return {name: part for name, part in parts.items() if part is not None}


def bitsandbytes() -> Any:
    """Return bitsandbytes, or ``None`` where it is not installed."""
    try:
        import bitsandbytes
    except ModuleNotFoundError:
        return None
    return bitsandbytes


def quant_state(parts: Inputs, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return the bitsandbytes state of a weight's tensors."""
    functional = bitsandbytes().functional
    second = functional.QuantState(
        absmax=parts["nested_absmax"], code=parts["code"], blocksize=256, dtype=torch.float32
    )
    return functional.QuantState(
        absmax=parts["absmax"], shape=torch.Size(shape), blocksize=64, quant_type="nf4", dtype=dtype,
        offset=parts["offset"], state2=second, code=functional.get_4bit_type("nf4", device=parts["absmax"].device),
    )  # fmt: skip


def _bnb_dequantize(n: int, k: int) -> Provider | None:
    library, states = bitsandbytes(), Kept[Any]()

    def run(packed: torch.Tensor, **parts: torch.Tensor) -> Any:
        return library.functional.dequantize_4bit(packed, states(packed, lambda: quant_state(parts, (n, k))))

    return library and run


def _bnb_matvec(n: int, k: int) -> Provider | None:
    library, states = bitsandbytes(), Kept[Any]()

    def run(x: torch.Tensor, packed: torch.Tensor, **parts: torch.Tensor) -> Any:
        return library.matmul_4bit(x, packed, states(packed, lambda: quant_state(parts, (n, k), x.dtype)))

    return library and run


def _weights(tiny: bool) -> dict[str, tuple[int, int]]:
    return {"tiny": (8, 128)} if tiny else WEIGHTS


def dequantize_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``dequantize_nf4``, with nested absmaxes, to bf16."""
    cases = []
    for name, (n, k) in _weights(tiny).items():
        ours = partial(dequantize_nf4, shape=(n, k), dtype=torch.bfloat16)
        reference = partial(ours, impl="torch")
        moved = n * k // 2 + n * k // 64 + size(n, k)
        cases.append(
            Case(
                "nf4", name, partial(nf4_inputs, n=n, k=k),
                present(
                    torch=reference, compile=torch.compile(reference), bnb=_bnb_dequantize(n, k), fvlm=ours
                ), reference, forward_bytes=moved,
                shape={"out": n, "in": k},
            )
        )  # fmt: skip
    return cases


def matvec_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``nf4_matvec``: one row and eight."""
    cases = []
    for name, (n, k) in _weights(tiny).items():
        for rows in (1, 8):

            def make(device: torch.device, n: int = n, k: int = k, rows: int = rows) -> Inputs:
                return {"x": normal(device, rows, k, seed=1), **nf4_inputs(device, n, k)}

            ours = partial(nf4_matvec, shape=(n, k))
            reference = partial(ours, impl="torch")
            cases.append(
                Case(
                    "nf4_matvec", f"{name}, {rows} rows", make,
                    present(torch=reference, bnb=_bnb_matvec(n, k), fvlm=ours), reference,
                    forward_bytes=n * k // 2 + n * k // 64 + size(rows, n + k), shape={"rows": rows, "out": n, "in": k},
                )
            )  # fmt: skip
    return cases


def _bnb_quantize() -> Provider | None:
    library = bitsandbytes()

    def run(x: torch.Tensor) -> Any:
        packed, state = library.functional.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True)
        return packed, state.absmax, state.state2.absmax

    return library and run


def _quantize(x: torch.Tensor, impl: Any = None) -> Any:
    made = quantize_nf4(x, impl=impl)
    return made.packed, made.absmax, made.nested_absmax


def _there_and_back(x: torch.Tensor, impl: Any = None) -> torch.Tensor:
    """Quantize and dequantize: the codes are no numbers that could be nearly right."""
    return dequantize_weight(quantize_nf4(x.float(), impl=impl), impl="torch").to(x.dtype)


def quantize_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``quantize_nf4`` with nested absmaxes, from bf16."""
    cases = []
    for name, (n, k) in _weights(tiny).items():

        def make(device: torch.device, n: int = n, k: int = k) -> Inputs:
            return {"x": normal(device, n, k) * k**-0.5}

        cases.append(
            Case(
                "quantize_nf4", name, make,
                present(torch=partial(_quantize, impl="torch"), bnb=_bnb_quantize(), fvlm=_quantize),
                partial(_there_and_back, impl="torch"), checked=_there_and_back, recorded=False,
                forward_bytes=size(n, k) + n * k // 2 + n * k // 64, shape={"out": n, "in": k},
            )
        )  # fmt: skip
    return cases


def int8_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``dequantize_int8``, to bf16."""
    cases = []
    for name, (n, k) in _weights(tiny).items():

        def make(device: torch.device, n: int = n, k: int = k) -> Inputs:
            scale = normal(device, n, dtype=torch.float32).abs()
            return {"codes": (normal(device, n, k) * 40).clamp(-127, 127).to(torch.int8), "scale": scale}

        ours = partial(dequantize_int8, dtype=torch.bfloat16)
        reference = partial(ours, impl="torch")
        cases.append(
            Case(
                "int8", name, make, present(torch=reference, compile=torch.compile(reference), fvlm=ours), reference,
                forward_bytes=n * k + size(n, k), shape={"out": n, "in": k},
            )
        )  # fmt: skip
    return cases
