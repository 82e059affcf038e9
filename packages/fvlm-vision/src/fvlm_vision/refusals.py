"""Batches whose samples are good and that a family's processor or model cannot take, refused before it stumbles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvlm_core.errors import DataError
from fvlm_vision.reading import Item, placed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import ProcessorMixin


def has_one_place_for_pixels(processor: ProcessorMixin) -> bool:
    """Return whether a processor gives images and videos the same names, so that of a batch with both it keeps one."""
    family: Any = processor
    if not {"image_processor", "video_processor"} <= set(family.get_attributes()):
        return False
    return not set(family.image_processor.model_input_names).isdisjoint(family.video_processor.model_input_names)


def refuse_both_kinds(items: Sequence[Item]) -> None:
    """Raise if a batch holds images and videos, for a processor that `has_one_place_for_pixels`.

    Raises:
        DataError: it does; named is the first sample with a video.
    """
    if any(item.images for item in items) and any(item.videos for item in items):
        item = next(item for item in items if item.videos)
        reason = (
            "a video is in one batch with images, of which this model takes one kind at a time; give its frames as "
        )
        raise placed(DataError(f"{reason}images, or train on videos apart."), item.row, item.where)


def refuse_few_image_tokens(items: Sequence[Item], is_image: Tensor, least: int) -> None:
    """Raise if a batch has images, and fewer tokens of them than its model takes.

    Args:
        items: its samples.
        is_image: shape (batch, tokens), bool: which tokens stand for images.
        least: the fewest of them that a model takes (`ArchFacts.least_image_tokens`).

    Raises:
        DataError: it has; named is the first sample with an image.
    """
    found = int(is_image.sum())
    if 0 < found < least:
        item = items[int(is_image.any(dim=1).nonzero()[0])]
        reason = f"the images of a batch come to {found} token of the {least} that this model needs at the least"
        raise placed(DataError(f"{reason}; enlarge them with min_pixels, or drop the sample."), item.row, item.where)
