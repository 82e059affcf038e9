"""Profiles of ops that are bound by memory, or by what the host does around them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from benchmarks.kernels import traffic
from benchmarks.kernels.case import Case, Inputs
from benchmarks.kernels.clock import Call
from benchmarks.kernels.probe import Part, Probe

import fvlm_kernels


def norms(probe: Probe) -> Iterator[Part]:
    """Norms beside launches of their shape that compute nothing, and PyTorch's copy and sum of the same bytes."""
    names = "Qwen2-VL-2B vision, doc", "Gemma 3 4B vision", "Qwen2.5-VL-7B text, doc, weight trained"
    for op in ("layer_norm", "rms_norm"):
        for case in [c for c in probe.cases(op, *names) if "residual" not in c.name]:
            yield from _norm(probe, case)


def _norm(probe: Probe, case: Case) -> Iterator[Part]:
    sets, trained = probe.inputs(case), "weight" in case.wanted
    pairs = [(s["x"], torch.randn_like(s["x"])) for s in sets]
    one_way, back = case.forward_bytes, case.backward_bytes

    def floor(x: torch.Tensor, dy: torch.Tensor | None) -> Call:
        return lambda: traffic.norm_rows(x, dy, trained=trained)

    yield Part(case.op, case.name, "forward", probe.provider(case, "fvlm", "forward", sets), one_way)
    yield Part(case.op, case.name, "copy_", probe.us([x.clone for x, _ in pairs]), one_way)
    yield Part(case.op, case.name, "backward", probe.provider(case, "fvlm", "backward", sets), back)
    sums: list[Call] = [partial(torch.add, x, dy) for x, dy in pairs]
    yield Part(case.op, case.name, "torch.add of two such tensors", probe.us(sums), back)
    if case.op == "layer_norm":  # whose launches `traffic` imitates
        what = "same launch without arithmetic"
        yield Part(case.op, case.name, f"forward, {what}", probe.us([floor(x, None) for x, _ in pairs]), one_way)
        yield Part(case.op, case.name, f"backward, {what}", probe.us([floor(x, dy) for x, dy in pairs]), back)


def rotary(probe: Probe) -> Iterator[Part]:
    """Rotations beside a launch a token that only copies."""
    for op in ("rotary", "multimodal_rotary"):
        for case in probe.cases(op, "Qwen2-VL-2B text, doc", "Gemma 3 4B"):
            sets, moved = probe.inputs(case), case.forward_bytes
            for mode in ("forward", "backward"):
                yield Part(op, case.name, mode, probe.provider(case, "fvlm", mode, sets), moved)
            if op == "rotary":
                yield from _token_floors(probe, case, sets)


def _token_floors(probe: Probe, case: Case, sets: list[Inputs]) -> Iterator[Part]:
    moved, programs = case.forward_bytes, case.shape["rows"]

    def copied(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Call:
        return partial(traffic.tokens, q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    yield Part(case.op, case.name, "a launch a token that copies", probe.us([copied(**s) for s in sets]), moved)
    flat = [torch.empty(moved // 4, dtype=torch.bfloat16, device=probe.device) for _ in sets]
    yield Part(case.op, case.name, "copy_ of as many bytes", probe.us([x.clone for x in flat]), moved)
    empty = probe.us([partial(traffic.nothing, s["q"], programs) for s in sets])
    yield Part(case.op, case.name, f"an empty launch of {programs} programs", empty)


def activations(probe: Probe) -> Iterator[Part]:
    """Plain GELUs beside PyTorch's and its copy."""
    for case in probe.cases("gelu", "Gemma 3 4B", "Llama-3.2"):
        sets = probe.inputs(case)
        for mode, moved in (("forward", case.forward_bytes), ("backward", case.backward_bytes)):
            for name in ("fvlm", "torch"):
                yield Part("gelu", case.name, f"{mode}, {name}", probe.provider(case, name, mode, sets), moved)
        copies: list[Call] = [next(iter(s.values())).clone for s in sets]
        yield Part("gelu", case.name, "copy_", probe.us(copies), case.forward_bytes)


def codes(probe: Probe) -> Iterator[Part]:
    """Dequantization and products beside reading the codes, writing as much, and the same from the L2 cache."""
    for case in probe.cases("nf4", "Qwen2", "Llama", "Gemma"):
        sets, moved = probe.inputs(case), case.forward_bytes
        yield Part("nf4", case.name, "dequantize_nf4", probe.provider(case, "fvlm", "forward", sets), moved)
        alike: list[Call] = [partial(traffic.words, s["packed"], s["absmax"], write=True) for s in sets]
        yield Part("nf4", case.name, "same traffic without looking up", probe.us(alike), moved)
    for case in probe.cases("nf4_matvec", "Qwen2", "Llama", "Gemma"):
        sets, moved = probe.inputs(case), case.forward_bytes
        yield Part("nf4_matvec", case.name, "cold", probe.provider(case, "fvlm", "forward", sets), moved)
        once = probe.provider(case, "fvlm", "forward", sets[:1] * len(sets))
        yield Part("nf4_matvec", case.name, "codes in the L2 cache where they fit", once, moved)
        if case.shape["rows"] == 1:
            reads: list[Call] = [partial(traffic.words, s["packed"], s["absmax"], write=False) for s in sets]
            yield Part("nf4_matvec", case.name, "reading the codes", probe.us(reads), moved)
            empty = probe.us([partial(traffic.nothing, s["packed"], 1024) for s in sets])
            yield Part("nf4_matvec", case.name, "an empty launch of 1,024 programs", empty)


def host(probe: Probe) -> Iterator[Part]:
    """What a call costs the host, layer by layer: why small calls from Python take as long as they do."""
    rows = 2 if probe.tiny else 64
    x = torch.randn(rows, 1280, device=probe.device, dtype=torch.float32 if probe.tiny else torch.bfloat16)
    w, impl = torch.ones(1280, device=probe.device, dtype=x.dtype), "triton" if probe.tiny else None
    wanted = x.clone().requires_grad_()
    native = torch.nn.functional.layer_norm
    layers: dict[str, Call] = {
        "torch.nn.functional.layer_norm": lambda: native(x, (1280,), w, w, 1e-6),
        "the same with a gradient": lambda: native(wanted, (1280,), w, w, 1e-6),
        "an empty Triton kernel of one argument": lambda: traffic.nothing(x, 1),
        "the operator fvlm::layer_norm_fwd": lambda: torch.ops.fvlm.layer_norm_fwd(x, w, w, 1e-6, x.dtype),
        "fvlm_kernels.layer_norm": lambda: fvlm_kernels.layer_norm(x, w, w, 1e-6, impl=impl),
        "the same with its gradient recorded": lambda: fvlm_kernels.layer_norm(wanted, w, w, 1e-6, impl=impl),
    }
    for what, call in layers.items():
        yield Part("layer_norm", "64 rows of 1280", f"the host's time: {what}", probe.host(call))
