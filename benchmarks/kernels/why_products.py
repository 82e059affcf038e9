"""Profiles of ops that are bound by matrix products: the products alone, and what is left beside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.kernels.bench_lora import MLP
from benchmarks.kernels.case import Case, Inputs
from benchmarks.kernels.clock import RECORD_BELOW, Call
from benchmarks.kernels.measure import calls_of
from benchmarks.kernels.probe import Part, Probe
from torch.nn.attention import SDPBackend, sdpa_kernel

from fvlm_kernels import swiglu, varlen_attention

KINDS = {  # of kernels, by what their names hold; the first that fits
    "dequantization": ("dequantize", "Dequantize"),
    "activation": ("gated", "silu", "activation"),
    "sums of split products": ("splitKreduce",),
    "products": ("nvjet", "gemm", "cutlass"),
}


def _kernels(probe: Probe, call: Call) -> dict[str, tuple[float, float]]:
    """Return microseconds and launches of one call by kind of kernel, as the profiler saw them."""
    found: dict[str, tuple[float, float]] = {}
    if not probe.clock.is_gpu:
        return found
    rounds = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            call()
        probe.clock.sync()
    for event in profiler.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), "element by element")
        us, launches = found.get(kind, (0.0, 0.0))
        found[kind] = us + event.self_device_time_total / rounds, launches + event.count / rounds
    return found


def _small(probe: Probe, shape: tuple[int, int]) -> tuple[int, int]:
    return (shape[0] // 64, shape[1] // 64) if probe.tiny else shape


def _dense(probe: Probe, *shape: int) -> torch.Tensor:
    dtype = torch.float32 if probe.tiny else torch.bfloat16
    return torch.randn(shape, device=probe.device, dtype=torch.float32).to(dtype)


def lora(probe: Probe) -> Iterator[Part]:
    """``lora_mlp``: ours and PEFT's operations, by kind of kernel, beside the parts that both must do."""
    for case in probe.cases("lora_mlp", "Qwen2-VL-2B text", "Qwen2.5-VL-7B text"):
        sets = [case.make(probe.device)]
        for name in [n for n in ("fvlm", "peft") if n in case.providers]:
            call = calls_of(case, name, "both", sets)[0]
            yield Part("lora_mlp", case.name, f"{name}, both passes", _both(probe, call), flops=case.flops_of("both"))
            for kind, (us, launches) in _kernels(probe, call).items():
                yield Part("lora_mlp", case.name, f"{name}: {kind}, {launches:.0f} launches", round(us, 1))
        yield from _needed(probe, case, sets[0])


def _both(probe: Probe, call: Call) -> float:
    return probe.us([call] * (3 if probe.clock.once(call) < RECORD_BELOW else 1))


def _needed(probe: Probe, case: Case, tensors: Inputs) -> Iterator[Part]:
    """What no fused form is without: the base's products, two dequantizations a weight, the activation."""
    rows, model = case.shape["rows"], case.name.rsplit(",", 1)[0]
    n, k = _small(probe, MLP[model]["gate"])
    x, g, w = _dense(probe, rows, k), _dense(probe, rows, n), _dense(probe, n, k)
    us = 3 * (probe.us([partial(torch.matmul, x, w.t())] * 4) + probe.us([partial(torch.matmul, g, w)] * 4))
    yield Part("lora_mlp", case.name, "needed: the base's six products", round(us, 1), flops=12 * rows * n * k)
    parts: Any = {p: tensors[f"gate_{p}"] for p in ("packed", "absmax", "nested_absmax", "code", "offset")}
    one = partial(torch.ops.fvlm.nf4_dequantize, *parts.values(), 64, (n, k), w.dtype)
    moved = 6 * (n * k // 2 + n * k // 64 + w.nbytes)
    yield Part("lora_mlp", case.name, "needed: six dequantizations", round(6 * probe.us([one] * 4), 1), moved)
    leaf = g.clone().requires_grad_()
    impl = "triton" if probe.tiny else None
    out = swiglu(leaf, g, impl=impl)
    forward = probe.us([partial(torch.ops.fvlm.gated_fwd, g, g, "silu")] * 4)
    back = probe.us([partial(torch.autograd.grad, out, leaf, g, retain_graph=True)] * 4)
    yield Part("lora_mlp", case.name, "needed: the activation and its gradient", round(forward + back, 1))


def losses(probe: Probe) -> Iterator[Part]:
    """``linear_cross_entropy`` beside the product that makes its logits, and the one that makes the gradient."""
    names = ("Qwen2-VL-2B, 2048 rows, a", "Qwen2-VL-2B, 8192 rows, a third", "Gemma 3 4B, 2048 rows, all")
    for case in probe.cases("linear_cross_entropy", *names):
        kept, k, v = case.shape["kept"], case.shape["width"], case.shape["vocabulary"]
        sets = [case.make(probe.device)]
        for mode in ("forward", "both"):
            us = probe.provider(case, "fvlm", mode, sets)
            yield Part("linear_cross_entropy", case.name, mode, us, flops=case.flops_of(mode))
        x, w, g = _dense(probe, kept, k), _dense(probe, v, k), _dense(probe, kept, v)
        one = 2 * kept * k * v
        us = probe.us([partial(torch.matmul, x, w.t())] * 2)
        yield Part("linear_cross_entropy", case.name, "the product of the logits alone, in one piece", us, flops=one)
        us = probe.us([partial(torch.matmul, g, w)] * 2)
        yield Part("linear_cross_entropy", case.name, "the product of the gradient alone", us, flops=one)
        if "weight" in case.wanted:
            us = probe.us([partial(torch.matmul, g.t(), x)] * 2)
            yield Part("linear_cross_entropy", case.name, "the product of the head's gradient alone", us, flops=one)
        yield Part("linear_cross_entropy", case.name, "copy_ of the logits", probe.us([g.clone] * 2), 2 * g.nbytes)


def attention(probe: Probe) -> Iterator[Part]:
    """``varlen_attention``'s backends, and PyTorch's backends segment by segment."""
    for case in probe.cases("varlen_attention", *("Qwen2", "Llama", "Gemma")):
        sets = [case.make(probe.device)]
        lengths, causal = sets[0]["cu_seqlens"].diff().tolist(), "text" in case.name
        longest = max(lengths)
        even = len(set(lengths)) == 1
        impls = ["torch"] if probe.tiny else [*(["batched"] if even else []), "flash"]
        for impl in impls:
            call = partial(varlen_attention, max_seqlen=longest, causal=causal, impl=impl)
            yield from _passes(probe, case, call, sets[0], impl)
        if even or probe.tiny:
            continue
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                call = partial(varlen_attention, causal=causal, impl="torch")
                yield from _passes(probe, case, call, sets[0], f"segment by segment, {backend.name}")


def _passes(probe: Probe, case: Case, call: Any, tensors: Inputs, what: str) -> Iterator[Part]:
    given = {n: t.detach().requires_grad_(n in case.wanted) for n, t in tensors.items()}
    try:
        with torch.no_grad():
            call(**given)
        out = call(**given)
    except RuntimeError as reason:  # a backend that does not take the case
        print(f"varlen_attention {case.name}: {what} cannot run, {str(reason).splitlines()[0]}", flush=True)
        return

    def forward() -> Any:
        with torch.no_grad():
            return call(**given)

    leaves, dy = [given[n] for n in case.wanted], torch.randn_like(out)
    backward = partial(torch.autograd.grad, out, leaves, dy, retain_graph=True)
    for mode, timed in (("forward", forward), ("backward", backward)):
        yield Part("varlen_attention", case.name, f"{mode}, {what}", probe.us([timed] * 2), flops=case.flops_of(mode))
