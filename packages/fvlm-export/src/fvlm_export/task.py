"""What a call means: what is merged onto what, and why.

:mod:`fvlm_export.from_live` and :mod:`fvlm_export.from_folder` work it out; :mod:`fvlm_export.build` carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fvlm_core.checkpoint import Source
from fvlm_export.bases import Base
from fvlm_export.changes import Change
from fvlm_export.live import LiveModel
from fvlm_export.record import NO_TRAINING, Training

ORIGINAL, DEQUANTIZED, LIVE = "original", "dequantized", "live"


@dataclass(frozen=True)
class Task:
    """A merge, ready to be planned.

    Attributes:
        base: what is merged onto.
        changes: parameter → what the adapters do to it.
        onto: ``original``, ``dequantized`` or ``live``.
        why: one sentence on that.
        config: the output's config before it is adapted, as a dict.
        source: the base checkpoint; None: unknown.
        adapters: adapter → its weight (and file hash), for the report.
        files_from: where processor files are looked for if no processor is given.
        live: the live model; None when merging folders.
        live_values: see :class:`fvlm_export.compute.Merger`.
        dtype: the floating dtype of the output where the caller asks for none; None: each tensor keeps its own.
        trust: whether the base may bring its own model class.
        revision: the base's commit on the Hub, where it is known.
        training: what the adapters' notes say of their training.
    """

    base: Base
    changes: dict[str, list[Change]]
    onto: str
    why: str
    config: dict[str, Any]
    source: Source | None
    adapters: dict[str, dict[str, Any]]
    files_from: list[Source]
    live: LiveModel | None = None
    live_values: dict[str, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    trust: bool = False
    revision: str | None = None
    training: Training = NO_TRAINING

    @property
    def reads(self) -> list[Path]:
        """The folders that it reads."""
        return [source.folder for source in (self.source, *self.files_from) if source and source.folder]

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        if self.live is not None:
            return torch.device("cpu") if self.live.base.device.type == "meta" else self.live.base.device
        return device_for_files()


def device_for_files() -> torch.device:
    """Return where files are merged: the current GPU, by its number since other threads have another, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def config_dtype(config: dict[str, Any], default: torch.dtype) -> torch.dtype:
    """Return the dtype that a ``config.json`` names, under its old or its new key."""
    name = config.get("dtype") or config.get("torch_dtype")
    found = torch.__dict__.get(name) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else default
