"""Show where the time of ops goes that miss a goal: each beside the parts and the floors that it cannot be below.

    python -m benchmarks.kernels.why [--out FILE.jsonl] [--commit C] [SUBJECT ...]

A floor is a launch of the same shape that moves the same bytes and computes nothing (:mod:`.traffic`), PyTorch's own
copy, an empty launch, or a matrix product alone. Times are those of recorded calls on inputs that no cache holds,
except where a line says otherwise. ``--tiny`` tries everything on the CPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.kernels import why_memory, why_products
from benchmarks.kernels.card import ceilings, provenance
from benchmarks.kernels.clock import Clock
from benchmarks.kernels.probe import Part, Probe

SUBJECTS: dict[str, Callable[[Probe], Iterator[Part]]] = {
    "norms": why_memory.norms,
    "rotary": why_memory.rotary,
    "gelu": why_memory.activations,
    "nf4": why_memory.codes,
    "host": why_memory.host,
    "lora": why_products.lora,
    "losses": why_products.losses,
    "attention": why_products.attention,
}


def line(part: Part, ceiling: dict[str, float]) -> str:
    """Return a line of the table: the share is that of the card's copy or product rate."""
    rate = ""
    if part.nbytes:
        rate = f"{part.nbytes / part.us / 1e-6 / ceiling['bytes']:6.1%} of a copy's rate"
    if part.flops:
        rate = f"{part.flops / part.us / 1e-6 / ceiling['flops']:6.1%} of a product's rate"
    return f"{part.op:20s} {part.case:44s} {part.what:52s} {part.us:9.1f} us {rate}"


def main(arguments: list[str] | None = None) -> int:
    """Time everything asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"any of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    parser.add_argument("--commit", help="the commit measured, where there is no git history to ask")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.subjects) - set(SUBJECTS):
        parser.error(f"no subject is called {sorted(unknown)[0]!r}; there are {', '.join(SUBJECTS)}")
    device = torch.device("cpu") if options.tiny else torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device)
    ceiling = ceilings(clock, options.tiny)
    where = provenance(device, options.commit) | {"ceiling": ceiling}
    begin = time.monotonic()
    for subject in options.subjects or SUBJECTS:
        with clock.on_stream():
            for part in SUBJECTS[subject](Probe(clock, options.tiny)):
                print(line(part, ceiling), flush=True)
                if options.out is not None:
                    with options.out.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(asdict(part) | where) + "\n")
        if clock.is_gpu:
            torch.cuda.empty_cache()
        print(f"{subject}: {time.monotonic() - begin:.0f} s so far", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
