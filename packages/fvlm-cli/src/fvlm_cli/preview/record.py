"""A preview as plain data, for `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fvlm_cli.preview.histogram import histogram
from fvlm_cli.preview.look import Preview, Shown


def as_data(preview: Preview) -> dict[str, Any]:
    """Return everything but the pictures."""
    return {
        "rows": preview.rows,
        "streamed": preview.streamed,
        "eval_rows": preview.eval_rows,
        "checked": preview.checked,
        "max_seq_length": preview.limit,
        "lengths": preview.lengths,
        "histogram": [asdict(item) for item in histogram(preview.lengths)],
        "learned_tokens": sum(preview.learned),
        "fates": preview.fates,
        "changed": [{"place": place, "fate": fate, "reason": reason} for place, fate, reason in preview.changed],
        "refused": preview.refused,
        "duplicates": [{"place": place, "first": first} for place, first in preview.duplicates],
        "evaluated_on_trained_images": [{"place": place, "first": first} for place, first in preview.leaked],
        "samples": [_sample(shown) for shown in preview.shown],
    }


def _sample(shown: Shown) -> dict[str, Any]:
    return {
        "place": shown.place,
        "fate": shown.fate,
        "reason": shown.reason,
        "tokens": {kind: shown.count(kind) for kind in ("trained", "masked", "media", "cut")},
        "pieces": [asdict(piece) for piece in shown.pieces],
        "images": [
            {
                "original": list(image.original),
                "width": image.width,
                "height": image.height,
                "tiles": image.tiles,
                "tokens": image.tokens,
            }
            for image in shown.images
        ],
    }
