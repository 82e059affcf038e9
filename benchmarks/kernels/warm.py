"""Fill the caches of Triton and torch.compile in several processes at once, so that the benchmark itself need not wait.

Every case's kernels are compiled by calling each provider once. What a process compiles lies in the caches on disk,
where the benchmark finds it; on its own it would compile one kernel after another for several times as long.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait

import torch
from benchmarks.kernels.case import Case
from benchmarks.kernels.measure import REFUSALS, calls_of
from benchmarks.kernels.ops import OPS

COMPILED = ("compile", "liger", "fvlm")
HEAVY = ("linear_cross_entropy", "cross_entropy")
HEAVY_WORKERS = 3
"""Processes at once for ops whose plain forms take up to 25 GB."""


def one_thread() -> None:
    """Make torch.compile compile in the calling process alone; the result is cached alike."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1


def _device(tiny: bool) -> torch.device:
    return torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())


def compile_case(case: Case, device: torch.device) -> None:
    """Call the providers of a case that compile anything, in each of its passes."""
    inputs = case.make(device)
    for name in [n for n in COMPILED if n in case.providers]:
        for mode in case.passes:
            try:
                calls_of(case, name, mode, [inputs])[0]()
            except REFUSALS as reason:
                print(f"{case.op} {case.name}: {name} not compiled ahead, {str(reason).splitlines()[0]}", flush=True)


def _compile(op: str, index: int, skip: Sequence[str], tiny: bool) -> None:
    one_thread()
    torch._dynamo.reset()
    case = OPS[op](tiny)[index]
    for name in skip:
        case.providers.pop(name, None)
    compile_case(case, _device(tiny))
    if not tiny:
        torch.cuda.empty_cache()


def warm(ops: Sequence[str], workers: int, skip: Sequence[str], tiny: bool) -> None:
    """Compile what the cases of some ops need, in ``workers`` processes."""
    light = [op for op in ops if op not in HEAVY]
    for some, most in ((light, workers), ([op for op in ops if op in HEAVY], min(workers, HEAVY_WORKERS))):
        tasks = [(op, i) for op in some for i in range(len(OPS[op](tiny)))]
        if not tasks:
            continue
        with ProcessPoolExecutor(most, mp_context=multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(_compile, op, i, skip, tiny) for op, i in tasks]
            wait(running)
        for future in running:
            future.result()
