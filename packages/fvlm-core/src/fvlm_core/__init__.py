"""Quantized loading, architecture facts and gradient checkpointing for vision-language models.

Public names are resolved on first use, so that importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvlm_core.arch import ArchFacts, LinearModule, facts_by_type, facts_for, linear_modules
    from fvlm_core.checkpointing import apply_checkpointing, checkpointing_mode, remove_checkpointing
    from fvlm_core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ExportError,
        FvlmError,
        MissingExtraError,
        ResourceError,
    )
    from fvlm_core.load import load_model
    from fvlm_core.origin import Origin, origin_of, set_origin
    from fvlm_core.precision import Precision, choose_dtype, choose_precision

__version__ = "0.1.0"

_HOME = {
    "ArchFacts": "arch",
    "LinearModule": "arch",
    "facts_by_type": "arch",
    "facts_for": "arch",
    "linear_modules": "arch",
    "apply_checkpointing": "checkpointing",
    "checkpointing_mode": "checkpointing",
    "remove_checkpointing": "checkpointing",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "FvlmError": "errors",
    "MissingExtraError": "errors",
    "ResourceError": "errors",
    "load_model": "load",
    "Origin": "origin",
    "origin_of": "origin",
    "set_origin": "origin",
    "Precision": "precision",
    "choose_dtype": "precision",
    "choose_precision": "precision",
}

__all__ = [  # noqa: RUF022 (grouped by module, as in _HOME)
    "ArchFacts", "LinearModule", "facts_by_type", "facts_for", "linear_modules",
    "apply_checkpointing", "checkpointing_mode", "remove_checkpointing",
    "CheckpointError", "ConfigError", "DataError", "ExportError", "FvlmError", "MissingExtraError",
    "ResourceError",
    "load_model",
    "Origin", "origin_of", "set_origin",
    "Precision", "choose_dtype", "choose_precision",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
