"""The pixels that a model gets, turned back into pictures: after every resizing, cropping and tiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_COLUMNS = 4  # tiles in a row of the picture of a tiled image


@dataclass(frozen=True)
class Seen:
    """One image as the model gets it.

    Attributes:
        width, height: of a tile, in pixels.
        tiles: how many there are; 1 for families that do not cut images up.
        tokens: that stand for it in the text.
        original: (width, height) of the image as it was given.
        picture: what the model gets, tiles side by side.
    """

    width: int
    height: int
    tiles: int
    tokens: int
    original: tuple[int, int]
    picture: Image.Image


def pictures(batch: Mapping[str, Any], image_processor: Any) -> tuple[tuple[int, int], int, Image.Image] | None:
    """Return the size (width, height) of a tile, the number of tiles and the picture of a batch of one image.

    Args:
        batch: of a collator, from one sample with one image.
        image_processor: its mean, deviation, patch and merge size are undone.

    Returns:
        None where the family hands its pixels over in a way that is not known here.
    """
    pixels = batch.get("pixel_values")
    if not isinstance(pixels, Tensor):
        return None
    grid = batch.get("image_grid_thw")
    if grid is not None:
        tiles = _from_patches(pixels.float(), [int(side) for side in grid[0]], image_processor)
    elif pixels.ndim >= 4 and pixels.shape[-3] == 3:
        tiles = pixels.float().reshape(-1, *pixels.shape[-3:])
        filled = (tiles != 0).flatten(1).any(dim=1)  # tiles that only pad a batch are zero throughout
        tiles = tiles[filled] if bool(filled.any()) else tiles[:1]
        sizes = batch.get("image_sizes")
        if isinstance(sizes, Tensor) and len(tiles) == 1:  # padded to the batch's largest image
            height, width = (int(side) for side in sizes[0])
            if height <= tiles.shape[2] and width <= tiles.shape[3]:
                tiles = tiles[:, :, :height, :width]
    else:
        return None
    return (tiles.shape[3], tiles.shape[2]), len(tiles), _montage(_to_bytes(tiles, image_processor))


def _from_patches(pixels: Tensor, grid: list[int], image_processor: Any) -> Tensor:
    """Undo the Qwen-VL layout: patches in merged blocks, each (channel, frame, row, column), to (1, 3, H, W)."""
    frames, rows, columns = grid
    patch, merge = int(image_processor.patch_size), int(image_processor.merge_size)
    depth = pixels.shape[1] // (3 * patch * patch)
    blocks = pixels.reshape(frames, rows // merge, columns // merge, merge, merge, 3, depth, patch, patch)
    ordered = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return ordered.reshape(frames * depth, 3, rows * patch, columns * patch)[:1]  # an image's frames are all the same


def _to_bytes(tiles: Tensor, image_processor: Any) -> Tensor:
    if image_processor.do_normalize:
        mean = torch.tensor(image_processor.image_mean).reshape(3, 1, 1)
        deviation = torch.tensor(image_processor.image_std).reshape(3, 1, 1)
        tiles = tiles * deviation + mean
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    return (tiles / factor).round().clamp(0, 255).to(torch.uint8)


def _montage(tiles: Tensor) -> Image.Image:
    from PIL import Image

    count, _, height, width = tiles.shape
    across = min(count, _COLUMNS)
    paper = Image.new("RGB", (across * width, -(-count // across) * height), "white")
    for place, tile in enumerate(tiles):
        picture = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
        paper.paste(picture, ((place % across) * width, (place // across) * height))
    return paper
