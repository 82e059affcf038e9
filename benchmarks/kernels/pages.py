"""Write committed rows into the pages of ``docs/kernels``: all of them into one, a few of each op into the op's own.

    python -m benchmarks.kernels.pages [--check]

``benchmarks.md`` keeps what stands above its first section, and gets a section an op: where its rows were measured, and
their table. An op's page ends with its first and last case. ``--check`` writes nothing, and ends with status 1 where a
page is not what it would write.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.kernels.card import ROOT
from benchmarks.kernels.reach import Row, latest
from benchmarks.kernels.run import RESULTS, read
from benchmarks.kernels.table import table

PAGES = {
    "norms.md": ("rms_norm", "layer_norm"),
    "activations.md": ("swiglu", "geglu", "gelu"),
    "rotary.md": ("rotary", "multimodal_rotary", "vision_rotary"),
    "vision.md": ("patch_embed", "varlen_attention"),
    "nf4.md": ("nf4", "nf4_matvec", "quantize_nf4", "int8"),
    "lora.md": ("lora_linear", "lora_qkv", "lora_mlp"),
    "decoding.md": ("lora_decode", "decode_attention"),
    "losses.md": ("linear_cross_entropy", "cross_entropy"),
    "optimizer.md": ("adamw",),
}
HEADING = "\n## Rows\n"


def _ours(rows: list[Row], op: str) -> list[Row]:
    return [by["fvlm"] for (name, _, _), by in latest(rows).items() if name == op and "fvlm" in by]


def origin(rows: list[Row], op: str) -> str:
    """Return where and of which commit an op's rows are."""
    found = sorted({f"{row['card'].removeprefix('NVIDIA ')}, commit {row['commit']}" for row in _ours(rows, op)})
    return "One " + "; one ".join(found) + "."


def ends(rows: list[Row], op: str) -> list[Row]:
    """Keep the rows of an op's first and last case, which are the smallest and one of the largest."""
    cases = list(dict.fromkeys(row["case"] for row in _ours(rows, op)))
    return [row for row in rows if row["op"] == op and row.get("case") in (cases[0], cases[-1])]


def all_rows(text: str, rows: list[Row]) -> str:
    """Return ``benchmarks.md`` with the tables of all ops."""
    parts = [text.split("\n## ", 1)[0].rstrip()]
    for op in [op for ops in PAGES.values() for op in ops]:
        parts += [f"\n## {op}\n", origin(rows, op), "", *table(rows, [op])]
    return "\n".join(parts) + "\n"


def few_rows(text: str, rows: list[Row], ops: tuple[str, ...]) -> str:
    """Return an op's page with its first and last case at its end."""
    parts = [text.split(HEADING, 1)[0].rstrip(), HEADING]
    for op in ops:
        parts += [f"`{op}`, its first and last case. {origin(rows, op)}", "", *table(ends(rows, op), [op]), ""]
    parts.append("All rows, and what the columns are: [benchmarks.md](benchmarks.md).")
    return "\n".join(parts) + "\n"


def pages(folder: Path, rows: list[Row]) -> dict[Path, str]:
    """Return the text of every page that holds rows."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in ("benchmarks.md", *PAGES)}
    made = {folder / name: few_rows(texts[name], rows, ops) for name, ops in PAGES.items()}
    return {folder / "benchmarks.md": all_rows(texts["benchmarks.md"], rows)} | made


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "kernels")
    options = parser.parse_args(arguments)
    stale = 0
    for path, text in pages(options.folder, read(RESULTS)).items():
        if path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{path.name} {'is not what the rows say' if options.check else 'written'}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
