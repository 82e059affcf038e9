"""Benchmark the kernels against eager PyTorch, torch.compile and Liger.

    python -m benchmarks.kernels.run [--out FILE.jsonl] [--skip PROVIDER] [--tiny] [OP ...]

Every op is held to the error policy at the shape to be measured before it is timed; one that fails is refused, and the
run ends with status 1. Rows are appended to the file, one a case, pass and provider. ``--tiny`` runs small shapes on
the CPU, to test the benchmark itself: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels import activations, bench_lora, bench_nf4, losses, norms, optimizer, rotations, vision_parts
from benchmarks.kernels.card import ROOT, ceilings, provenance
from benchmarks.kernels.case import Case
from benchmarks.kernels.measure import Clock, Timing, check, measure

OPS: dict[str, Callable[[bool], list[Case]]] = {
    "rms_norm": norms.rms_cases,
    "layer_norm": norms.layer_cases,
    "gated": activations.gated_cases,
    "gelu": activations.plain_cases,
    "rotary": rotations.rotary_cases,
    "vision_rotary": rotations.vision_cases,
    "patch_embed": vision_parts.patch_cases,
    "varlen_attention": vision_parts.attention_cases,
    "nf4": bench_nf4.dequantize_cases,
    "nf4_matvec": bench_nf4.matvec_cases,
    "int8": bench_nf4.int8_cases,
    "lora_qkv": bench_lora.qkv_cases,
    "lora_mlp": bench_lora.mlp_cases,
    "linear_cross_entropy": losses.linear_cases,
    "cross_entropy": losses.loss_cases,
    "adamw": optimizer.adamw_cases,
}


def row_of(case: Case, mode: str, provider: str, timing: Timing, ceiling: dict[str, float]) -> dict[str, Any]:
    """Return one row of results: times in microseconds, the rate reached and its share of the card's ceiling."""
    moved, worked = 0, 0
    if mode != "backward":
        moved, worked = case.forward_bytes, case.forward_flops
    if mode != "forward":
        moved, worked = moved + case.backward_bytes, worked + case.backward_flops
    unit, amount = ("bytes", moved) if moved else ("flops", worked)
    rate = amount / timing.p50
    return {
        "op": case.op,
        "case": case.name,
        "pass": mode,
        "provider": provider,
        "shape": case.shape,
        "p20_us": round(timing.p20 * 1e6, 2),
        "p50_us": round(timing.p50 * 1e6, 2),
        "p80_us": round(timing.p80 * 1e6, 2),
        "host_us": round(timing.host * 1e6, 2),
        "peak_mib": round(timing.peak / 2**20, 1),
        "GB/s" if moved else "TFLOP/s": round(rate / (1e9 if moved else 1e12), 1),
        "of_ceiling": round(rate / ceiling[unit], 3),
    }


def show(row: dict[str, Any]) -> None:
    """Print one row for a reader."""
    rate = f"{row['GB/s']:8.1f} GB/s   " if "GB/s" in row else f"{row['TFLOP/s']:8.1f} TFLOP/s"
    print(
        f"{row['op']:16s} {row['case']:44s} {row['pass']:8s} {row['provider']:8s} {row['p50_us']:9.1f} us"
        f" {rate} {row['of_ceiling']:6.1%} host {row['host_us']:7.1f} us  {row['peak_mib']:8.1f} MiB",
        flush=True,
    )


def run_case(case: Case, clock: Clock, repeats: int, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """Check, then time one case; return its rows, or one that says why it was refused."""
    try:
        check(case, clock.device)
    except AssertionError as reason:
        print(f"{case.op} {case.name}: REFUSED, {reason}", flush=True)
        return [{"op": case.op, "case": case.name, "refused": str(reason)}]
    rows = []
    for mode in case.passes:
        for provider, timing in measure(case, clock, mode, repeats).items():
            rows.append(row_of(case, mode, provider, timing, ceiling))
            show(rows[-1])
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(OPS)}; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.jsonl")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--commit", help="the commit measured, where there is no git history to ask")
    parser.add_argument("--skip", action="append", default=[], metavar="PROVIDER", help="leave out, such as compile")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"no op is called {sorted(unknown)[0]!r}; there are {', '.join(OPS)}")
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; percentiles need at least 2")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny tries the benchmark on the CPU")
    device = torch.device("cpu") if options.tiny else torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device)
    ceiling, where = ceilings(clock, options.tiny), provenance(device, options.commit)
    copy, product = ceiling["bytes"] / 1e9, ceiling["flops"] / 1e12
    print(f"{where['card']}: copy {copy:.0f} GB/s, bf16 product {product:.1f} TFLOP/s", flush=True)
    refused = False
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as out:
        for op in options.ops or OPS:
            for case in OPS[op](options.tiny):
                for provider in set(options.skip) & set(case.providers) - {"fvlm"}:
                    del case.providers[provider]
                torch._dynamo.reset()  # one case's specializations are not another's
                for row in run_case(case, clock, options.repeats, ceiling):
                    refused |= "refused" in row
                    out.write(json.dumps(row | {"ceiling": ceiling} | where) + "\n")
                out.flush()
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
