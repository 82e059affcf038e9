"""FastVisionModel and what trains it: fine-tune vision-language models fast and in little memory.

Public names are resolved on first use, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvlm_vision.collator import FastVisionDataCollator
    from fvlm_vision.labels import train_on_responses_only
    from fvlm_vision.model import FastVisionModel
    from fvlm_vision.trainer import FastVisionTrainer

__version__ = "0.1.0"

__all__ = ["FastVisionDataCollator", "FastVisionModel", "FastVisionTrainer", "train_on_responses_only"]

_HOME = {
    "FastVisionDataCollator": "collator",
    "FastVisionModel": "model",
    "FastVisionTrainer": "trainer",
    "train_on_responses_only": "labels",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
