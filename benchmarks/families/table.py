"""Print the newest row of each family as a table for docs/families.md.

python -m benchmarks.families.table [benchmarks/results/families.jsonl]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.kernels.card import ROOT

ROWS = ROOT / "benchmarks" / "results" / "families.jsonl"
_HEAD = "| model | tokens a batch | load, s | peak of loading, GiB | step, s | peak of training, GiB | 16 tokens, s |"


def newest(lines: list[str]) -> list[dict[str, Any]]:
    """Return the last row of each model, in the order of the models' first ones."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        rows[row["name"]] = row
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; a figure that was not measured is a dash."""
    lines = [_HEAD, "|---" * (_HEAD.count("|") - 1) + "|"]
    for row in rows:
        cells = [row["name"], str(row["tokens_per_batch"]), f"{row['load_s']:.1f}", _gib(row, "load")]
        cells += [f"{row['step_s']:.3f}", _gib(row, "train"), f"{row['generate_s']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gib(row: dict[str, Any], part: str) -> str:
    peak = row.get(f"{part}_peak_gib")
    return "–" if peak is None else f"{peak:.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and where it was measured."""
    given = sys.argv[1:] if arguments is None else arguments
    rows = newest((Path(given[0]) if given else ROWS).read_text(encoding="utf-8").splitlines())
    print(table(rows))
    for commit, card in sorted({(row["commit"], row["card"]) for row in rows}):
        print(f"\n{card}, commit {commit}")


if __name__ == "__main__":
    main()
