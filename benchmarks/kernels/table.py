"""Write rows of results as a Markdown table, for an op's page in ``docs/kernels``.

    python -m benchmarks.kernels.table FILE.jsonl OP ...

A line is a case and a pass: our time on the device (between events where it was not recorded), its share of the card's
ceiling and of a copy of the same size, and how many times as long the others take, on the device and in eager mode.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.kernels.reach import CLOCKS, Row, latest, microseconds
from benchmarks.kernels.run import read

PEERS = ("torch", "compile", "liger", "bnb", "peft")


def _times(ours: Row, peer: Row | None) -> str:
    """Return how many times as long a peer takes by each clock, or a dash where it was not run."""
    if peer is None:
        return "–"
    return " / ".join(f"{microseconds(peer, clock) / microseconds(ours, clock):.2f}" for clock in CLOCKS)


def _line(op: str, case: str, mode: str, by_provider: dict[str, Row], peers: list[str]) -> str:
    ours = by_provider["fvlm"]
    copy = f" ({ours['of_copy']:.0%})" if "of_copy" in ours else ""
    cells = [f"`{op}` {case}", mode, f"{microseconds(ours, 'device'):.1f}", f"{ours['of_ceiling']:.0%}{copy}"]
    return "| " + " | ".join([*cells, *(_times(ours, by_provider.get(peer)) for peer in peers)]) + " |"


def table(rows: list[Row], ops: list[str]) -> list[str]:
    """Return the lines of a table of some ops' rows, a column for each peer that was run; of equal rows the last."""
    found = {key: by for key, by in latest(rows).items() if key[0] in ops and "fvlm" in by}
    peers = [peer for peer in PEERS if any(peer in by for by in found.values())]
    head = ["case", "pass", "µs", "of the ceiling (of a copy)", *(f"× {peer}, device / eager" for peer in peers)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + [_line(op, case, mode, by, peers) for (op, case, mode), by in found.items()]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("ops", nargs="+", metavar="OP", help="as in the rows: swiglu, nf4, linear_cross_entropy, …")
    options = parser.parse_args(arguments)
    rows = read(options.file)
    if missing := set(options.ops) - {row["op"] for row in rows}:
        parser.error(f"{options.file} has no row of {sorted(missing)[0]!r}")
    print("\n".join(table(rows, options.ops)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
