"""A preview on the terminal, or as text: trained text stands between ⟦ and ⟧ wherever there is no colour."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from fvlm_cli.preview.histogram import histogram, quantile
from fvlm_cli.preview.look import Preview, Shown
from fvlm_cli.preview.tokens import Kind, Piece

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: dict[Kind, str] = {"trained": "bold green", "masked": "dim", "media": "magenta", "cut": "red strike"}
_MARKS: dict[Kind, tuple[str, str]] = {
    "trained": ("⟦", "⟧"),
    "masked": ("", ""),
    "media": ("<", ">"),
    "cut": ("✂", "✂"),
}
_LISTED = 20  # rows of one kind that are named
_BAR = 40
_BESIDE = 24  # columns that stand beside a bar


def show(console: Console, preview: Preview) -> None:
    """Draw a preview."""
    for shown in preview.shown:
        _show_row(console, shown)
    if preview.lengths:
        _show_lengths(console, preview)
    _show_fates(console, preview)
    _list(console, "cannot be used", preview.refused)
    _list(console, "are not whole", (f"{place}: {fate}: {reason}" for place, fate, reason in preview.changed))
    _list(console, "are duplicates", (f"{place} says the same as {first}" for place, first in preview.duplicates))
    _list(
        console,
        "are evaluated on an image that is trained on",
        (f"{place} shows the image of {first}" for place, first in preview.leaked),
    )


def _show_row(console: Console, shown: Shown) -> None:
    from rich.text import Text

    counts = ", ".join(f"{shown.count(kind)} {kind}" for kind in _STYLES if shown.count(kind))
    heading = f"{shown.place}: {counts}"
    if len(heading) + len(" ─") > console.width:  # a rule would cut it off
        console.print(heading, markup=False)
    else:
        console.rule(Text(heading), align="left", style="dim")
    for image in shown.images:
        tiles = f" in {image.tiles} tiles" if image.tiles > 1 else ""
        original = f"{image.original[0]}×{image.original[1]}"
        console.print(f"image {original} → {image.width}×{image.height}{tiles}, {image.tokens} tokens", markup=False)
    line = Text()
    coloured = console.color_system is not None and not console.no_color
    for kind, group in groupby(shown.pieces, key=lambda piece: piece.kind):
        run = list(group)
        text = _media_text(run) if kind == "media" else "".join(piece.text for piece in run)
        opening, closing = ("", "") if coloured else _MARKS[kind]
        line.append(f"{opening}{text}{closing}", style=_STYLES[kind])
    console.print(line)
    if shown.reason:
        console.print(f"{shown.fate}: {shown.reason}", markup=False)
    console.print()


def _media_text(group: Iterable[Piece]) -> str:
    """Return media tokens in short: the first of each run with its number."""
    words = []
    for piece in group:
        one = (
            piece.text if len(piece.ids) == 1 else f"{piece.text[: len(piece.text) // len(piece.ids)]}×{len(piece.ids)}"
        )
        words.append(one)
    return "".join(words)


def _show_lengths(console: Console, preview: Preview) -> None:
    lengths = preview.lengths
    bins = histogram(lengths)
    most = max(item.rows for item in bins)
    widest = max(1, min(_BAR, console.width - _BESIDE))
    console.print(
        f"tokens a row: {min(lengths)} to {max(lengths)}, half of the rows up to {quantile(lengths, 0.5)}, 95 % up to "
        f"{quantile(lengths, 0.95)}; model.max_seq_length is {preview.limit}"
    )
    for item in bins:
        bar = "█" * -(-item.rows * widest // most)
        mark = "  over the limit" if item.low > preview.limit else ""
        console.print(f"{item.low:>7}–{item.high:<7} {bar} {item.rows}{mark}")


def _show_fates(console: Console, preview: Preview) -> None:
    of = "all" if preview.checked == preview.rows else f"the first {preview.checked} of"
    of = f"{of} {preview.rows} rows" if not preview.streamed else f"the first {preview.checked} rows of a stream"
    console.print(f"{of} to train on were checked, {preview.eval_rows} are to evaluate on:")
    console.print("  " + ", ".join(f"{count} {fate}" for fate, count in preview.fates.items()))


def _list(console: Console, what: str, lines: Iterable[str]) -> None:
    found = list(lines)
    if not found:
        return
    console.print(f"{len(found)} rows {what}:")
    for line in found[:_LISTED]:
        console.print(f"  {line}", markup=False)
    if len(found) > _LISTED:
        console.print(f"  … and {len(found) - _LISTED} more; --json has them all")
