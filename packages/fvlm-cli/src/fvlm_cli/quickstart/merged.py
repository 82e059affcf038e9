"""Merging the adapter, and checking the merged folder with nothing but transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvlm_cli.quickstart.reading import transcribe

if TYPE_CHECKING:
    from PIL import Image


def read_with_transformers(
    folder: Path, images: Sequence[Image.Image], *, device: Any, dtype: Any, progress: Callable[[int], None]
) -> list[str]:
    """Load a merged folder as anyone without FVLM would, and return what it reads.

    Args:
        folder: the merged checkpoint.
        images: what to read.
        device: where the model runs.
        dtype: what it computes in: that of the adapter model, so that only the merge is compared.
        progress: called after each batch with the number of images read in it.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
    return transcribe(model, AutoProcessor.from_pretrained(folder), images, progress=progress)
