"""Benchmark the kernels against eager PyTorch, torch.compile, Liger, bitsandbytes and PEFT's operations.

    python -m benchmarks.kernels.run [--quick] [--workers N] [--minutes M] [--out FILE.jsonl] [--skip PROVIDER] [OP ...]
    python -m benchmarks.kernels.run --check FILE.jsonl

Every op is held to the error policy at the shape to be measured before it is timed; one that fails is refused, and the
run ends with status 1. Rows are appended to the file, one a case, pass and provider; at the end comes a table of
what is not reached. ``--check`` makes one of everything, of a file alone, and ends with status 1 where something is not
reached. ``--workers`` compiles in so many processes before anything is timed. After ``--minutes`` no further case is
begun, and those left out are named. ``--tiny`` runs small shapes on the CPU, to test the benchmark itself: its figures
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernels.card import ROOT, ceilings, provenance
from benchmarks.kernels.case import Case
from benchmarks.kernels.clock import Clock
from benchmarks.kernels.measure import Timing, check, measure
from benchmarks.kernels.ops import OPS, thinned
from benchmarks.kernels.reach import report
from benchmarks.kernels.warm import one_thread, warm

Row = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 2)


def row_of(case: Case, mode: str, provider: str, timing: Timing, ceiling: dict[str, float], copying: float) -> Row:
    """Return one row of results: times in microseconds, and the rate reached as a share of the card's.

    Args:
        case, mode, provider, timing: what was measured.
        ceiling: bytes and operations a second of the card.
        copying: bytes a second of a copy that moves as much as this pass; not used where operations are the measure.
    """
    moved, worked = case.bytes_of(mode), case.flops_of(mode)
    unit, amount = ("bytes", moved) if moved else ("flops", worked)
    rate = amount / (timing.device or timing.p50)
    return {
        "op": case.op,
        "case": case.name,
        "pass": mode,
        "provider": provider,
        "shape": case.shape,
        "p20_us": _microseconds(timing.p20),
        "p50_us": _microseconds(timing.p50),
        "p80_us": _microseconds(timing.p80),
        "device_us": _microseconds(timing.device),
        "eager_us": _microseconds(timing.eager),
        "host_us": _microseconds(timing.host),
        "peak_mib": round(timing.peak / 2**20, 1),
        "GB/s" if moved else "TFLOP/s": round(rate / (1e9 if moved else 1e12), 1),
        "of_ceiling": round(rate / ceiling[unit], 3),
    } | ({"of_copy": round(rate / copying, 3)} if moved else {})


def show(row: Row) -> None:
    """Print one row for a reader."""
    if "failed" in row:
        print(f"{row['op']:20s} {row['case']:46s} {row['pass']:8s} {row['provider']:8s} failed: {row['failed']}")
        return
    rate = f"{row['GB/s']:7.1f} GB/s   " if "GB/s" in row else f"{row['TFLOP/s']:7.1f} TFLOP/s"
    device = f"{row['device_us']:9.1f}" if row["device_us"] is not None else "        -"
    same = f" ({row['of_copy']:.0%} of a copy)" if "of_copy" in row else ""
    print(
        f"{row['op']:20s} {row['case']:46s} {row['pass']:8s} {row['provider']:8s} busy {row['p50_us']:9.1f} device"
        f" {device} eager {row['eager_us']:9.1f} host {row['host_us']:8.1f} us {rate} {row['of_ceiling']:6.1%}{same}"
        f" {row['peak_mib']:8.1f} MiB",
        flush=True,
    )


def run_case(case: Case, clock: Clock, repeats: int, ceiling: dict[str, float]) -> list[Row]:
    """Check, then time one case; return its rows, or one that says why it was refused."""
    try:
        check(case, clock.device)
    except AssertionError as reason:
        print(f"{case.op} {case.name}: REFUSED, {reason}", flush=True)
        return [{"op": case.op, "case": case.name, "refused": str(reason)}]
    rows: list[Row] = []
    for mode in case.passes:
        copying = clock.copying(case.bytes_of(mode)) if case.bytes_of(mode) else 0.0
        for provider, timing in measure(case, clock, mode, repeats).items():
            if isinstance(timing, Timing):
                rows.append(row_of(case, mode, provider, timing, ceiling, copying))
            else:
                rows.append({"op": case.op, "case": case.name, "pass": mode, "provider": provider, "failed": timing})
            show(rows[-1])
    return rows


def _cases(options: argparse.Namespace) -> list[Case]:
    cases = []
    for op in options.ops or OPS:
        made = OPS[op](options.tiny)
        cases += thinned(made) if options.quick else made
    for case in cases:
        for provider in set(options.skip) & set(case.providers) - {"fvlm"}:
            del case.providers[provider]
    return cases


def run_all(options: argparse.Namespace, clock: Clock, keep: Callable[[list[Row]], None]) -> None:
    """Run the cases until they are done or the time is up."""
    begin = time.monotonic()
    if options.workers:
        warm(options.ops or list(OPS), options.workers, options.skip, options.tiny)
        print(f"compiled ahead in {time.monotonic() - begin:.0f} s", flush=True)
    ceiling = ceilings(clock, options.tiny)
    where = provenance(clock.device, options.commit) | {"ceiling": ceiling}
    copy, product = ceiling["bytes"] / 1e9, ceiling["flops"] / 1e12
    print(f"{where['card']}: copy {copy:.0f} GB/s, bf16 product {product:.1f} TFLOP/s", flush=True)
    left = _cases(options)
    while left and time.monotonic() - begin < options.minutes * 60:
        case = left.pop(0)
        torch._dynamo.reset()  # one case's specializations are not another's
        with clock.on_stream() if case.recorded else nullcontext():
            keep([row | where for row in run_case(case, clock, options.repeats, ceiling)])
        if clock.is_gpu:
            torch.cuda.empty_cache()  # recorded graphs had memory of their own
    for case in left:
        print(f"{case.op} {case.name}: left out, the time is up", flush=True)
    print(f"{time.monotonic() - begin:.0f} s in all", flush=True)


def read(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(OPS)}; all by default")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/kernels.jsonl; nowhere with --tiny")
    parser.add_argument("--check", type=Path, metavar="FILE", help="run nothing, judge the rows of a file")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of a provider and pass, at most")
    parser.add_argument("--quick", action="store_true", help="two cases of each op")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile before anything is timed")
    parser.add_argument("--minutes", type=float, default=60, help="after which no further case is begun")
    parser.add_argument("--commit", help="the commit measured, where there is no git history to ask")
    parser.add_argument("--skip", action="append", default=[], metavar="PROVIDER", help="leave out, such as compile")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"no op is called {sorted(unknown)[0]!r}; there are {', '.join(OPS)}")
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; percentiles need at least 2")
    if options.out is None:  # what --tiny measures is no result
        options.out = Path(os.devnull) if options.tiny else RESULTS
    if options.check is not None and not options.check.is_file():
        parser.error(f"--check is {options.check}, which is no file; give one that a run has written")
    if options.check is None and not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny tries the benchmark on the CPU")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = _parse(arguments)
    if options.check is not None:
        lines, missed = report(read(options.check), everything=True)
        print("\n".join(lines))
        return int(missed > 0)
    one_thread()
    device = torch.device("cpu") if options.tiny else torch.device("cuda", torch.cuda.current_device())
    clock, kept = Clock(device), []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as out:

        def keep(rows: list[Row]) -> None:
            kept.extend(rows)
            out.writelines(json.dumps(row) + "\n" for row in rows)
            out.flush()

        run_all(options, clock, keep)
    print("\n".join(report(kept, everything=False)[0]))
    return int(any("refused" in row for row in kept))


if __name__ == "__main__":
    sys.exit(main())
