"""Where the time of FVLM's training step goes on a GPU: what the device does, and what it waits for.

    python -m benchmarks.training.profile qwen2_vl-2b FOLDER [--workload doc] [--mode unsloth] [--warmup 6] [--steps 2]
        [--gaps 12] [--trace FILE.json]

Some steps are trained, the next ones recorded by `torch.profiler`. Printed are the device's seconds of a step by kind
of work and its longest kernels, and its longest idle times with the work on both sides and what the host did meanwhile.
The profiler slows the host down: gaps are longer here than in a step that is not watched, their order is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.training.sizes import SIZES, write_checkpoint
from benchmarks.training.stacks import STACKS
from benchmarks.training.worker import training_arguments
from benchmarks.training.workloads import WORKLOADS, samples
from transformers import TrainerCallback, set_seed

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cpu_op", "cuda_runtime", "cuda_driver", "user_annotation", "python_function")
_KINDS = (
    ("attention", ("flash", "fmha", "sdpa", "attention", "attn", "cudnn_generated")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "matmul", "splitkreduce")),
    ("copies", ("memcpy", "memset", "copy", "foreach_", "multi_tensor")),
)
Event = dict[str, Any]


def kind_of(name: str) -> str:
    """Return the kind of work that a kernel does, by its name."""
    lowered = name.lower()
    return next((kind for kind, parts in _KINDS if any(part in lowered for part in parts)), "the rest")


def device_work(events: list[Event]) -> list[Event]:
    """Return what ran on the device, in order of its start."""
    return sorted((e for e in events if e.get("cat") in _DEVICE), key=lambda e: e["ts"])


def gaps(events: list[Event]) -> list[tuple[float, str, str, str]]:
    """Return the device's idle times, the longest first.

    Returns:
        Microseconds, the work before, the work behind, and what the host spent most of the time with.
    """
    host = [e for e in events if e.get("cat") in _HOST and e.get("dur", 0) > 0]
    found, last, end = [], None, 0.0
    for event in device_work(events):
        if last is not None and event["ts"] > end:
            found.append((event["ts"] - end, end, last["name"], event["name"]))
        if last is None or event["ts"] + event["dur"] > end:
            last, end = event, event["ts"] + event["dur"]
    found.sort(reverse=True)
    return [(long, before, behind, _during(host, start, start + long)) for long, start, before, behind in found]


def _during(host: list[Event], start: float, end: float) -> str:
    """Return the names of what the host did in a time, with microseconds, the longest three."""
    spent: dict[str, float] = defaultdict(float)
    for event in host:
        shared = min(end, event["ts"] + event["dur"]) - max(start, event["ts"])
        if shared > 0:
            spent[event["name"]] += shared
    longest = sorted(spent.items(), key=lambda pair: -pair[1])[:3]
    return ", ".join(f"{name[:60]} {time:.0f}" for name, time in longest)


def report(events: list[Event], steps: int, longest: int) -> str:
    """Return in words where the device's time went, a step of ``steps`` recorded ones."""
    work = device_work(events)
    if not work:
        return "nothing ran on a device"
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in work:
        kinds[kind_of(event["name"])] += event["dur"]
        kernels[event["name"]].append(event["dur"])
    idle = gaps(events)
    whole = max(e["ts"] + e["dur"] for e in work) - work[0]["ts"]
    lines = [f"a step: {whole / steps / 1e3:.1f} ms, idle {sum(gap[0] for gap in idle) / steps / 1e3:.1f} ms"]
    lines += [f"  {time / steps / 1e3:8.2f} ms {kind}" for kind, time in sorted(kinds.items(), key=lambda p: -p[1])]
    lines.append("kernels")
    for name, times in sorted(kernels.items(), key=lambda pair: -sum(pair[1]))[: 2 * longest]:
        lines.append(f"  {sum(times) / steps / 1e3:8.2f} ms {len(times) / steps:6.0f} times {name[:100]}")
    lines.append("idle times, of all steps")
    for time, before, behind, host in idle[:longest]:
        lines.append(f"  {time / 1e3:8.2f} ms from {before[:40]} to {behind[:40]}; host: {host}")
    return "\n".join(lines)


class _Watch(TrainerCallback):
    """Records the steps after the first ones."""

    def __init__(self, warmup: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profile, self._left = profile(activities=activities), warmup

    def on_step_end(self, *_: object, **__: object) -> None:
        self._left -= 1
        if self._left == 0:
            self.profile.start()


def main(arguments: list[str] | None = None) -> None:
    """Train, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", default="doc", choices=WORKLOADS)
    parser.add_argument("--mode", default="unsloth")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="how many are recorded")
    parser.add_argument("--gaps", type=int, default=12)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args(arguments)
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.size, options.folder)
    from fvlm_vision import FastVisionTrainer

    model, processor, collate = STACKS["fvlm"](str(options.folder), options.mode)
    workload, recorded = WORKLOADS[options.workload], options.steps
    data = samples(workload, 4 * workload.batch * workload.accumulation)
    ready = [collate(data[i : i + workload.batch]) for i in range(0, len(data), workload.batch)]
    watch = _Watch(options.warmup)
    options.steps += options.warmup
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(3407)
        FastVisionTrainer(
            model=model,
            args=training_arguments(options, 1, workload.accumulation, scratch),
            data_collator=lambda rows: dict(ready[rows[0]]),
            train_dataset=list(range(len(ready))),
            processing_class=processor,
            callbacks=[watch],
        ).train()
        watch.profile.stop()
        trace = options.trace or Path(scratch) / "trace.json"
        watch.profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    print(f"{options.size} {options.workload} {options.mode}")
    print(report(events, recorded, options.gaps))


if __name__ == "__main__":
    sys.exit(main())
