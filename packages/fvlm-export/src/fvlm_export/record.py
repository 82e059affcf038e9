"""What a finished folder says about itself: ``fvlm_export.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fvlm_core.errors import CheckpointError, ExportError
from fvlm_export.safetensor_file import sha256_of

FILE = "fvlm_export.json"


@dataclass(frozen=True)
class Training:
    """What a model card says of the training.

    Attributes:
        data: names of what was trained on: ids of Hub datasets, or names of files.
        metrics: metric → value.
    """

    data: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


NO_TRAINING = Training()


@dataclass(frozen=True)
class MergeReport:
    """How a folder came to be, and what was measured before it was announced.

    Attributes:
        save_method: ``merged_16bit``, ``merged_4bit`` or ``lora``.
        base: folder name or Hub id of the base checkpoint; None: a live model of unknown origin.
        base_revision: the commit on the Hub, as far as it is known; else the revision asked for.
        merged_onto: ``original`` (the checkpoint's weights), ``dequantized`` or ``live``; ``none`` for ``lora``.
        why: one sentence on that choice.
        base_fingerprint: see :func:`fvlm_export.base_check.fingerprint`; None: the base lived in memory.
        adapters: adapter → its weight, and the SHA-256 of its file or, from a live model, of its values.
        tensors: tensors written.
        merged: how many of them an adapter changed.
        overridden: parameters whose value was taken from the live model, because it differed from the base's.
        untied: parameters that share a tensor in the base and have their own here.
        files: file → its SHA-256.
        verified: what was proved, with the errors measured; empty: verification was turned off.
        data: what it was trained on, as far as that was said.
        metrics: metric → value, likewise.
        versions: of the packages that did it.
    """

    save_method: str
    base: str | None
    base_revision: str | None
    merged_onto: str
    why: str
    base_fingerprint: str | None = None
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: int = 0
    merged: int = 0
    overridden: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    verified: dict[str, Any] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        text = json.dumps(asdict(self), indent=2, sort_keys=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_report(folder: str | Path) -> MergeReport:
    """Read a folder's report.

    Raises:
        CheckpointError: the folder has none, or it cannot be read.
    """
    path = Path(folder) / FILE
    try:
        return MergeReport(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the folder was not written by fvlm_export.") from error


def check_files(folder: str | Path) -> None:
    """Compare a folder's weights with the hashes in its report.

    Raises:
        CheckpointError: the folder has no report, or it cannot be read.
        ExportError: one is missing or was changed since.
    """
    for name, digest in read_report(folder).files.items():
        path = Path(folder) / name
        if not path.is_file() or sha256_of(path) != digest:
            raise ExportError(f"{path} is not what {FILE} beside it says was written; save the model again.")


def versions() -> dict[str, str]:
    """Return the versions of what takes part in a merge."""
    import peft
    import safetensors
    import torch
    import transformers

    import fvlm_export

    modules = {"fvlm_export": fvlm_export, "torch": torch, "transformers": transformers, "peft": peft}
    return {name: str(module.__version__) for name, module in {**modules, "safetensors": safetensors}.items()}
