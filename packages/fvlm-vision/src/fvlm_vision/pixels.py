"""Pixels as bytes until they are on the device, where they become what the processor would have made of them.

A Qwen image processor spends most of its time on turning bytes into floats, and on writing each patch twice (a still
image is a video of two equal frames to these models). Both can wait: the bytes are an eighth of the floats, to write
and to send, and the device does the arithmetic in no time. The values are the processor's own, bit for bit: the same
subtraction and division in single precision.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ProcessorMixin

SCALE, FRAMES = "pixel_scale", "pixel_frames"

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # bytes a word → its dtype


def keeps_bytes(processor: ProcessorMixin) -> bool:
    """Return whether a processor's images can stay bytes.

    Only where it is known step by step what comes after the bytes: Qwen's own image processor (also of the later
    families), which resizes bytes, normalises them and cuts patches. Others that look like it cut in other orders.
    """
    from transformers import Qwen2VLImageProcessor

    images: Any = processor.image_processor
    return type(images) is Qwen2VLImageProcessor and bool(images.do_rescale and images.do_normalize)


def byte_processor(processor: ProcessorMixin) -> ProcessorMixin:
    """Return a copy of a processor for which `keeps_bytes`, whose `pixel_values` are bytes, each patch once.

    The two steps that are put off are replaced on the copy's image processor alone; the processor stays as it was.
    """
    images: Any = copy.copy(processor.image_processor)
    vars(images)["rescale_and_normalize"] = _as_they_are
    vars(images)["patchify"] = _patches
    copied: Any = copy.copy(processor)
    copied.image_processor = images
    return copied  # type: ignore[no-any-return]


def with_scale(batch: dict[str, Any], processor: ProcessorMixin) -> dict[str, Any]:
    """Return a batch of `byte_processor` with what makes values of its bytes.

    The bytes keep the name `pixel_values`: a model that is given them by mistake stumbles over half a patch, where it
    would ignore a name that it does not know, and with it the image.
    """
    if "pixel_values" not in batch:
        return batch
    images: Any = processor.image_processor
    scale = torch.tensor([images.image_mean, images.image_std]) * (1.0 / images.rescale_factor)
    return {**batch, SCALE: scale, FRAMES: images.temporal_patch_size}


def with_pixel_values(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with the values in the place of its bytes; one without bytes as it is.

    Args:
        batch: on any device; `pixel_values` uint8 (patches, channels · side²), `pixel_scale` float32 (2, channels):
            mean and deviation in units of a byte, `pixel_frames`: how often a patch is repeated.

    Returns:
        `pixel_values` float32 (patches, channels · frames · side²), as the processor's own.
    """
    if SCALE not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name not in (SCALE, FRAMES)}
    mean, deviation = batch[SCALE][:, None, :, None]
    patches = batch["pixel_values"].unflatten(1, (mean.shape[1], -1))
    values = patches.to(torch.float32).sub_(mean).div_(deviation)
    return {**rest, "pixel_values": values[:, :, None].expand(-1, -1, batch[FRAMES], -1).flatten(1)}


def _as_they_are(images: Tensor, *_: Any, **__: Any) -> Tensor:
    return images


def _patches(images: Tensor, patch_size: int, merge_size: int, temporal_patch_size: int) -> tuple[Tensor, int, int]:
    """Cut images (count, channels, height, width) into (count, patches, channels · side²), those to be merged adjacent.

    Returns:
        The patches, and how many there are in height and width.
    """
    count, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    # A row of a patch is moved in the widest words that it is a multiple of: 14 bytes are 7 words of 2.
    lanes = next(lanes for lanes in _WORDS if patch_size % lanes == 0)
    words = images.contiguous().view(_WORDS[lanes])
    cut = words.unflatten(3, (columns // merge_size, merge_size, patch_size // lanes))
    cut = cut.unflatten(2, (rows // merge_size, merge_size, patch_size))
    # count, channels, row, row in merge, y, column, column in merge, x
    ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return ordered.reshape(count, rows * columns, -1).view(torch.uint8), rows, columns
