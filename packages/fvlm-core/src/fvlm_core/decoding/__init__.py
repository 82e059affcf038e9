"""Decoding by recordings: after the prompt, one CUDA graph a token instead of thousands of launches.

The prompt is read by the model's ordinary forward pass, into keys and values at a fixed place. From then on a step of
the language model (embedding, layers, norm, head) is recorded once for a batch size and replayed for every token, and
so is the choice of the likeliest token. ``generate`` stays the way in: its preparation of inputs, processors and
criteria is stock's own, and its loop is replaced through the argument that transformers has for that. A call that has
no recorded form runs as stock has it, and is counted with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvlm_core.decoding.engine import (
        DecodingReport,
        decoding_report,
        decoding_unfit,
        disable_decoding,
        enable_decoding,
    )

__all__ = ["DecodingReport", "decoding_report", "decoding_unfit", "disable_decoding", "enable_decoding"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fvlm_core.decoding import engine

    return getattr(engine, name)
