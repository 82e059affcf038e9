"""What an adapter's own config does not say, noted beside it: ``fvlm_adapter.json``.

PEFT's config names the base; it does not say which weights stood under that name, whether they were quantized while
training, and what was trained on. A merge from folders needs the first two to be right, and a model card the third.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from fvlm_core.checkpoint import find_source, weight_files
from fvlm_core.errors import CheckpointError
from fvlm_core.origin import origin_of
from fvlm_export.base_check import fingerprint
from fvlm_export.live import look_at
from fvlm_export.safetensor_file import SafetensorFile

logger = logging.getLogger(__name__)

NOTE = "fvlm_adapter.json"


@dataclass(frozen=True)
class AdapterNote:
    """What is known of how an adapter was trained.

    Attributes:
        base: folder or Hub id of the base.
        base_revision: the Hub revision asked for.
        base_fingerprint: see :func:`fvlm_export.base_check.fingerprint`; None: the base was not a folder, or its files
            could not be read when the adapter was saved.
        precision: how the base was held: ``4bit``, ``8bit``, ``16bit`` or ``full``.
        dtype: of what was not quantized, and of quantized weights when they are dequantized.
        quantized: the modules whose weights were quantized while loading; empty where the checkpoint itself is.
        data: names of what it was trained on.
        metrics: metric → value.
    """

    base: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    precision: str | None = None
    dtype: str | None = None
    quantized: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it beside an adapter."""
        (folder / NOTE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_note(folder: Path) -> AdapterNote:
    """Return what is noted in an adapter's folder; an empty note if nothing is.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / NOTE
    if not path.is_file():
        return AdapterNote()
    try:
        return AdapterNote(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it, or save the adapter again.") from error


def note_of(model: torch.nn.Module) -> AdapterNote:
    """Return what a live model that FVLM loaded says about its base; an empty note for any other."""
    origin = origin_of(model)
    if origin is None:
        return AdapterNote()
    return AdapterNote(
        base=origin.source,
        base_revision=origin.revision,
        base_fingerprint=_print_of(Path(origin.source)),
        precision=origin.precision.value,
        dtype=origin.dtype,
        quantized=[] if origin.source_quantized else sorted(look_at(model).quantized),
    )


def _print_of(base: Path) -> str | None:
    if not base.is_dir():
        return None
    try:
        return fingerprint([SafetensorFile(path) for path in weight_files(find_source(base))])
    except CheckpointError as error:  # of a variant, or changed since: no reason to lose what was trained over it
        logger.warning("The adapter's note cannot say which weights its base holds: %s", error)
        return None


def note_training(folder: Path, data: Sequence[str], metrics: Mapping[str, float]) -> None:
    """Add what an adapter in a folder was trained on, and how well, for the card of what is made of it."""
    replace(read_note(folder), data=list(data), metrics=dict(metrics)).write(folder)
