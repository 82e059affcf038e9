"""The page of `fvlm report`: config, curves, metrics, and what was read on evaluation images, the worst first."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fvlm_cli.report.diff import Part, parts
from fvlm_cli.report.gathered import Gathered, curves, short_names
from fvlm_cli.report.page import write_page
from fvlm_core.errors import DataError

METRICS = {"exact_match": "exact match", "cer": "character error rate", "wer": "word error rate", "anls": "ANLS"}
_MEMORY = ("device_memory_gib", "host_memory_gib")
_ERRORS = ("cer", "wer", "loss")  # the less the better


@dataclass(frozen=True)
class Answer:
    """An answer on a card: what it is called, how it differs from the truth, and its character error rate."""

    name: str
    parts: list[Part]
    cer: float
    right: bool


@dataclass(frozen=True)
class Card:
    """One evaluation row.

    Attributes:
        place: where it stands.
        prompt, truth: as the data have them.
        images: as data URIs.
        answers: before and after training, and of the other run.
        kind: "wrong", "fixed" (it was wrong before), or "right".
        worse: whether training made it worse.
        cer: of the last answer of this run.
    """

    place: str
    prompt: str
    truth: str
    images: list[str]
    answers: list[Answer]
    kind: str
    worse: bool
    cer: float


def write_run_report(path: Path, run: Gathered, other: Gathered | None, most: int) -> int:
    """Write the page.

    Args:
        path: of the HTML file.
        run: what it is about.
        other: a run to set beside it, or None.
        most: how many evaluation rows are shown at most, the worst first.

    Returns:
        How many rows it shows.

    Raises:
        DataError: a picture of the run is missing.
    """
    runs = [run] if other is None else [run, other]
    names = short_names(runs)
    cards = _cards(run, other, names[-1])
    shown = cards[:most]
    write_page(
        path,
        "run.html.jinja",
        run=run,
        other=other,
        names=names,
        tiles=_tiles(run) if other is None else [],
        facts=[_facts(item) for item in runs],
        metrics=_metrics(runs),
        curves=[(label, Markup(svg)) for label, svg in curves(runs)],
        cards=[_with_images(card, run) for card in shown],
        counts={
            "all": len(shown),
            "wrong": sum(card.kind == "wrong" for card in shown),
            "fixed": sum(card.kind == "fixed" for card in shown),
            "worse": sum(card.worse for card in shown),
        },
        rows=len(cards),
        differing=_differing(runs),
    )
    return len(shown)


def _facts(run: Gathered) -> list[tuple[str, str]]:
    record, config = run.record, run.flat_config()
    found = {
        "status": record.get("status"),
        "model": config.get("model.name"),
        "precision": config.get("model.precision") or "4bit, or as stored",
        "steps": record.get("steps"),
        "seconds": record.get("seconds"),
        "rows": f"{record.get('rows') or 'a stream'} to train on, {record.get('eval_rows')} to evaluate on",
        "started": record.get("started"),
        "versions": ", ".join(
            f"{name} {record['versions'][name]}"
            for name in ("fvlm-cli", "torch", "transformers", "peft", "trl")
            if record.get("versions", {}).get(name)
        ),
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


def _tiles(run: Gathered) -> list[tuple[str, str]]:
    """Return (value, what it is) of the figures that are looked for first."""
    record, tiles = run.record, []
    for key, name in (("eval_loss", "evaluation loss"), ("train_loss", "training loss")):
        if record.get(key) is not None:
            tiles.append((f"{record[key]:.3f}", name))
            break
    for key in ("exact_match", "cer"):
        before, after = (record.get(f"answers_{when}", {}).get(key) for when in ("before", "after"))
        if after is not None:
            was = "" if before is None else f"{before:.1%} → "
            tiles.append((f"{was}{after:.1%}", METRICS[key]))
    if record.get("seconds") is not None:
        tiles.append((_duration(record["seconds"]), f"for {record.get('steps')} steps, loading and saving included"))
    memory = [entry[key] for entry in run.history for key in _MEMORY if key in entry]
    if memory:
        tiles.append((f"{max(memory):.1f} GiB", "peak memory"))
    return tiles


def _duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _metrics(runs: Sequence[Gathered]) -> list[dict[str, Any]]:
    """Return a row for each metric: its values before and after for every run, and which of the last is best."""
    rows = []
    for key, name in (("train_loss", "training loss"), ("eval_loss", "evaluation loss"), *METRICS.items()):
        cells: list[float | None] = []
        for run in runs:
            if key in METRICS:
                cells += [run.record.get(f"answers_{when}", {}).get(key) for when in ("before", "after")]
            else:
                cells += [None, run.record.get(key)]
        if any(cell is not None for cell in cells):
            last = [cell for cell in cells[1::2] if cell is not None]
            best = (min if key in _ERRORS or "loss" in key else max)(last) if last else None
            rows.append({"name": name, "cells": cells, "best": best if len(last) > 1 else None})
    return rows


def _cards(run: Gathered, other: Gathered | None, other_name: str) -> list[Card]:
    """Return all rows that the run answered, the worst first."""
    last = run.after or run.before
    cards = []
    for place, row in last.items():
        sources = [("before", run.before.get(place)), ("after", run.after.get(place))]
        if other is not None:
            sources.append((f"after, {other_name}", other.after.get(place)))
        answers = [_answer(name, found) for name, found in sources if found is not None]
        before = run.before.get(place)
        right = bool(row["exact_match"])
        was_wrong = before is not None and not before["exact_match"]
        kind = "wrong" if not right else "fixed" if was_wrong and run.after else "right"
        worse = before is not None and row["cer"] > before["cer"]
        cards.append(Card(place, row["prompt"], row["truth"], row["images"], answers, kind, worse, row["cer"]))
    return sorted(cards, key=lambda card: -card.cer)


def _answer(name: str, row: dict[str, Any]) -> Answer:
    prediction, truth = row["prediction"].strip(), row["truth"].strip()
    return Answer(name, parts(prediction, truth), row["cer"], bool(row["exact_match"]))


def _with_images(card: Card, run: Gathered) -> Card:
    images = [_data_uri(run.picture(name)) for name in card.images]
    return Card(card.place, card.prompt, card.truth, images, card.answers, card.kind, card.worse, card.cer)


def _data_uri(path: Path) -> str:
    """Return a picture file as a data URI, byte for byte."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing, which the run's answers name; evaluate again.") from None
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _differing(runs: Sequence[Gathered]) -> list[tuple[str, str, str]]:
    """Return (key, value, the other's value) of every config key that two runs disagree on."""
    if len(runs) < 2:
        return []
    one, two = (run.flat_config() for run in runs)
    keys = [key for key in {**one, **two} if one.get(key) != two.get(key)]
    return [(key, str(one.get(key)), str(two.get(key))) for key in keys]
