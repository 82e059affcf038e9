"""Cases of ``lora_linear``, ``lora_qkv``, ``lora_mlp`` and ``lora_decode`` over NF4, against PEFT's layers.

Both passes are timed together, since what is to be reached is said of both. The provider ``peft`` runs the operations
of those layers one by one, without the modules around them: in reality it costs a little more Python. ``torch`` is the
same with PyTorch's own dequantization. bf16 adapters of rank 16, scaling 1, no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from benchmarks.kernels.bench_nf4 import bitsandbytes, nf4_inputs, quant_state
from benchmarks.kernels.case import Case, Inputs, Kept, Provider, normal, present

from fvlm_kernels import LoRALinear, NF4Weight, dequantize_nf4, lora_decode, lora_linear, lora_mlp, lora_qkv, quick_gelu

RANK = 16
ROWS = (512, 8192)
Shapes = Mapping[str, tuple[int, int]]
LINEAR: dict[str, Shapes] = {
    "Qwen2-VL-2B text o_proj": {"o": (1536, 1536)},
    "Qwen2.5-VL-7B text o_proj": {"o": (3584, 3584)},
}
QKV: dict[str, Shapes] = {
    "Qwen2-VL-2B text": {"q": (1536, 1536), "k": (256, 1536), "v": (256, 1536)},
    "Qwen2.5-VL-7B text": {"q": (3584, 3584), "k": (512, 3584), "v": (512, 3584)},
    "Llama-3.2-11B-Vision text": {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096)},
    "Gemma 3 4B text": {"q": (2048, 2560), "k": (1024, 2560), "v": (1024, 2560)},
}
MLP: dict[str, Shapes] = {
    "Qwen2-VL-2B text": {"gate": (8960, 1536), "up": (8960, 1536), "down": (1536, 8960)},
    "Qwen2.5-VL-7B text": {"gate": (18944, 3584), "up": (18944, 3584), "down": (3584, 18944)},
    "Llama-3.2-11B-Vision text": {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)},
    "Gemma 3 4B text": {"gate": (10240, 2560), "up": (10240, 2560), "down": (2560, 10240)},
    "Qwen2-VL-2B vision": {"fc1": (5120, 1280), "fc2": (1280, 5120)},
}
ACTIVATIONS = {"Gemma 3 4B text": "gelu_tanh", "Qwen2-VL-2B vision": "quick_gelu"}  # "silu" elsewhere
PARTS = ("absmax", "nested_absmax", "code", "offset")
Layer = Callable[[str, torch.Tensor, Inputs], torch.Tensor]


def _make(device: torch.device, shapes: Shapes, rows: int) -> Inputs:
    first = next(iter(shapes.values()))
    made: Inputs = {"x": normal(device, rows, first[1], seed=99)}
    for i, (name, (n, k)) in enumerate(shapes.items()):
        made |= {f"{name}_{part}": tensor for part, tensor in nf4_inputs(device, n, k, seed=i).items()}
        made |= {f"{name}_a": normal(device, RANK, k, seed=10 + i) * k**-0.5}
        made |= {f"{name}_b": normal(device, n, RANK, seed=20 + i) * 0.1}
    return made


def _plus_adapter(y: torch.Tensor, name: str, x: torch.Tensor, tensors: Inputs) -> torch.Tensor:
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return y + (torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b) * 1.0).to(y.dtype)


def _eager(shapes: Shapes) -> Layer:
    """One layer with PyTorch's dequantization; it stays in float64 when given it."""

    def layer(name: str, x: torch.Tensor, tensors: Inputs) -> torch.Tensor:
        parts: dict[str, Any] = {part: tensors[f"{name}_{part}"] for part in PARTS}
        w = dequantize_nf4(tensors[f"{name}_packed"], shape=shapes[name], dtype=x.dtype, impl="torch", **parts)
        return _plus_adapter(torch.nn.functional.linear(x, w), name, x, tensors)

    return layer


def _peft(shapes: Shapes) -> Layer | None:
    """One layer as PEFT and bitsandbytes compute it."""
    library, states = bitsandbytes(), Kept[Any]()

    def layer(name: str, x: torch.Tensor, tensors: Inputs) -> torch.Tensor:
        parts, packed = {part: tensors[f"{name}_{part}"] for part in PARTS}, tensors[f"{name}_packed"]
        state = states(packed, lambda: quant_state(parts, shapes[name], x.dtype))
        return _plus_adapter(library.matmul_4bit(x, packed, state), name, x, tensors)

    return library and layer


def _ours(name: str, shapes: Shapes, tensors: Inputs) -> LoRALinear:
    absmax, nested_absmax, code, offset = (tensors[f"{name}_{part}"] for part in PARTS)
    packed = tensors[f"{name}_packed"]
    weight = NF4Weight(packed, absmax, shapes[name], torch.bfloat16, 64, nested_absmax, code, offset)
    return LoRALinear(weight, tensors[f"{name}_a"], tensors[f"{name}_b"])


def _each(layer: Layer | None, shapes: Shapes) -> Provider | None:
    return layer and (lambda x, **tensors: tuple(layer(name, x, tensors) for name in shapes))


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == "quick_gelu":
        return partial(quick_gelu, impl="torch")
    return torch.nn.functional.silu if name == "silu" else partial(torch.nn.functional.gelu, approximate="tanh")


def _block(layer: Layer | None, shapes: Shapes, act: str) -> Provider | None:
    *first, last = shapes
    activate = _activation(act)

    def run(x: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        if layer is None:
            raise TypeError("a block needs a layer")
        gate, *up = (layer(name, x, tensors) for name in first)
        return layer(last, activate(gate) * up[0] if up else activate(gate), tensors)

    return layer and run


def _fused(op: str, shapes: Shapes, act: Any) -> Provider:
    """One of our ops, with layers that are made once."""
    kept = Kept[LoRALinear]()

    def run(x: torch.Tensor, **tensors: torch.Tensor) -> Any:
        layers = [kept(tensors[f"{n}_a"], lambda name=n: _ours(name, shapes, tensors)) for n in shapes]
        if op == "lora_linear":
            return lora_linear(x, layers[0])
        if op == "lora_qkv":
            return lora_qkv(x, layers)
        if op == "lora_decode":
            return lora_decode(x, layers)
        gate, *up, down = layers
        return lora_mlp(x, gate, up[0] if up else None, down, activation=act)

    return run


def _case(op: str, model: str, full: Shapes, rows: int, tiny: bool) -> Case:
    shapes: Shapes = {name: (n // 64, k // 64) for name, (n, k) in full.items()} if tiny else full
    m = 4 if tiny else rows
    wanted = ["x", *(f"{name}_{part}" for name in shapes for part in "ab")]
    act = ACTIVATIONS.get(model, "silu")
    wrap: Callable[[Layer | None], Provider | None] = partial(_each, shapes=shapes)
    if op == "lora_mlp":
        wrap = partial(_block, shapes=shapes, act=act)
    eager = wrap(_eager(shapes))
    if eager is None:
        raise TypeError("the reference is always there")
    compiled = torch.compile(eager) if op == "lora_mlp" else None  # which takes as long to compile as all others
    base = sum(n * k for n, k in shapes.values())
    adapters = sum(RANK * (n + k) for n, k in shapes.values())
    return Case(
        op, f"{model}, {m} rows", partial(_make, shapes=shapes, rows=m),
        present(torch=eager, compile=compiled, peft=wrap(_peft(shapes)), fvlm=_fused(op, shapes, act)), eager, wanted,
        forward_flops=2 * m * (base + adapters), backward_flops=2 * m * (base + 2 * adapters), together=True,
        shape={"rows": m, "weights": base, "rank": RANK},
    )  # fmt: skip


def _cases(op: str, models: Mapping[str, Shapes], tiny: bool) -> list[Case]:
    return [_case(op, model, shapes, rows, tiny) for model, shapes in models.items() for rows in ROWS]


def linear_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``lora_linear``."""
    return _cases("lora_linear", LINEAR, tiny)


def qkv_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``lora_qkv``."""
    return _cases("lora_qkv", QKV, tiny)


def mlp_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``lora_mlp``."""
    return _cases("lora_mlp", MLP, tiny)


def decode_cases(tiny: bool) -> list[Case]:
    """Return the cases of ``lora_decode``: what layers that share an input read for one row and for eight."""
    groups = {f"{model} qkv": shapes for model, shapes in QKV.items()} | LINEAR
    for model, shapes in MLP.items():
        if "up" in shapes:
            groups[f"{model} gate and up"] = {name: shapes[name] for name in ("gate", "up")}
            groups[f"{model} down"] = {"down": shapes["down"]}
    cases = []
    for name, full in groups.items():
        shapes = {part: (n // 64, k // 64) for part, (n, k) in full.items()} if tiny else full
        for rows in (1, 8):
            eager = _each(_eager(shapes), shapes)
            if eager is None:
                raise TypeError("the reference is always there")
            base, k = sum(n * k for n, k in shapes.values()), next(iter(shapes.values()))[1]
            outputs = sum(n for n, _ in shapes.values())
            moved = base // 2 + base // 64 + 2 * RANK * (k * len(shapes) + outputs) + 2 * rows * (k + outputs)
            cases.append(
                Case(
                    "lora_decode", f"{name}, {rows} rows", partial(_make, shapes=shapes, rows=rows),
                    present(
                        torch=eager, peft=_each(_peft(shapes), shapes), fvlm=_fused("lora_decode", shapes, None)
                    ), eager, forward_bytes=moved, shape={"rows": rows, "weights": base, "rank": RANK},
                )
            )  # fmt: skip
    return cases
