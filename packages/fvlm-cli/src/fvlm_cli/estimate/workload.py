"""What one row of a run brings: tokens, patches, learned tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fvlm_cli.data.row import Row
from fvlm_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fvlm_cli.inspection.opened import Opened
    from fvlm_vision import FastVisionDataCollator


@dataclass(frozen=True)
class Load:
    """One row.

    Attributes:
        tokens: in the language model, those of images included.
        learned: of them.
        patches: in the vision tower, padding tiles included.
        spans: squared lengths of the pieces that vision attention sees together, summed; the mean of its blocks.
        pixels: numbers in its pixel tensors.
        media: tokens that stand for images.
        scales: 1 for a family whose images take tokens by their size, else 0.
    """

    tokens: int
    learned: int
    patches: int
    spans: int
    pixels: int
    media: int
    scales: int

    def scaled(self, factor: float) -> Load:
        """Return the row with images of so many times the pixels."""
        media = round(self.media * factor)
        return replace(
            self,
            tokens=self.tokens - self.media + media,
            patches=round(self.patches * factor),
            spans=round(self.spans * factor**2),
            pixels=round(self.pixels * factor),
            media=media,
        )


def loads_of_rows(collator: FastVisionDataCollator, rows: Sequence[Row], config: Any) -> list[Load]:
    """Return what rows bring, each through the collator alone; rows that are left out bring nothing.

    Raises:
        DataError: a row cannot be used.
    """
    collator = collator.keeping_empty_batches()
    found = []
    for row in rows:
        before = collator.overflow_counts.skipped
        try:
            batch = collator([row.sample])
        except DataError as error:
            raise row.refuse(error.reason.removeprefix("sample 0 of the batch: ")) from None
        if collator.overflow_counts.skipped == before:
            found.append(_load(batch, config, collator))
    if not found:
        raise ConfigError("every row that was looked at is over model.max_seq_length and left out; raise it.")
    return found


def load_of_image(
    collator: FastVisionDataCollator, opened: Opened, size: tuple[int, int], count: int, question: int, answer: int
) -> Load:
    """Return what a made-up row brings: blank images of a size, so many tokens asked and so many answered."""
    from PIL import Image

    whole = copy.copy(collator.keeping_empty_batches())
    whole.max_seq_length = None
    images = [Image.new("RGB", size, "white")] * count
    sample: dict[str, Any] = {"prompt": "?", "completion": "."}
    batch = whole([{**sample, "images": images} if images else sample])
    load = _load(batch, opened.skeleton.config, whole)
    return replace(load, tokens=load.tokens + question + answer, learned=load.learned + answer)


def _load(batch: Mapping[str, Any], config: Any, collator: FastVisionDataCollator) -> Load:
    import torch

    vision = config.to_dict().get("vision_config", {})
    sizes = patches_of(batch, vision)
    return Load(
        tokens=int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].shape[1],
        learned=int((batch["labels"][:, 1:] != collator.ignore_index).sum()),
        patches=sum(sizes),
        spans=sum(span_of(size, vision) for size in sizes),
        pixels=batch["pixel_values"].numel() if "pixel_values" in batch else 0,
        media=int(torch.isin(batch["input_ids"], torch.tensor(sorted(collator.media_ids))).sum()),
        scales=int("image_grid_thw" in batch),
    )


def patches_of(batch: Mapping[str, Any], vision: Mapping[str, Any]) -> list[int]:
    """Return how many patches the vision tower gets, of each piece that attends to itself alone: an image, mostly.

    Args:
        batch: of the collator or of a processor.
        vision: the config of the tower.
    """
    if "image_grid_thw" in batch:
        return [int(t) * int(h) * int(w) for t, h, w in batch["image_grid_thw"].tolist()]
    pixels, side = batch.get("pixel_values"), vision.get("patch_size", 14)
    if pixels is None:
        return []
    height, width = side if isinstance(side, list | tuple) else (side, side)
    if pixels.dim() == 4 and "image_sizes" in batch:  # padded to the largest
        return [int(h) // height * (int(w) // width) for h, w in batch["image_sizes"].tolist()]
    each = pixels.shape[-2] // height * (pixels.shape[-1] // width)
    crops = pixels.numel() // (pixels.shape[-1] * pixels.shape[-2] * pixels.shape[-3])
    together = pixels.shape[-4] if pixels.dim() == 6 else 1  # an image's tiles see each other (Llama 3.2 Vision)
    return [each * together] * (crops // together)


def span_of(patches: int, vision: Mapping[str, Any]) -> int:
    """Return the square of an image's patches; where most blocks attend in windows (Qwen2.5-VL), the blocks' mean."""
    whole = vision.get("fullatt_block_indexes")
    if whole is None:
        return patches * patches
    window: int = min(patches, (vision["window_size"] // vision["patch_size"]) ** 2)
    share: float = len(whole) / vision["depth"]
    return round(patches * (share * patches + (1 - share) * window))
