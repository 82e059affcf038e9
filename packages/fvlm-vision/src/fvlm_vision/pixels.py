"""Pixels as bytes until they are on the device, where they become what the processor would have made of them.

A Qwen image processor spends most of its time on turning bytes into floats, and on writing each patch twice (a still
image is a video of two equal frames to these models). Both can wait: the bytes are an eighth of the floats, to write
and to send, and the device does the arithmetic in no time. The values are the processor's own, bit for bit: the same
subtraction and division in single precision.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import BatchFeature, ProcessorMixin

logger = logging.getLogger(__name__)

SCALE, FRAMES = "pixel_scale", "pixel_frames"


def keeps_bytes(processor: ProcessorMixin) -> bool:
    """Return whether a processor's images can stay bytes.

    Only where it is known step by step what comes after the bytes: Qwen's own image processor (also of the later
    families), which resizes bytes, normalises them and cuts patches. Others that look like it cut in other orders. The
    steps are not transformers' public interface, so they are tried on two small images, and where a version gives
    other pixels, or cannot be asked, the log says so and its own values are sent.
    """
    from transformers import Qwen2VLImageProcessor

    images: Any = processor.image_processor
    if type(images) is not Qwen2VLImageProcessor or not (images.do_rescale and images.do_normalize):
        return False
    if not _agrees(processor):
        logger.warning(
            "This transformers makes other pixels of images than fvlm_vision.pixels expects: they are made on the CPU."
        )
        return False
    return True


def _agrees(processor: ProcessorMixin) -> bool:
    """Tell whether bytes of two images, one to be resized, become the very values of the processor itself."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise[0]), Image.fromarray(noise[1][:45, :67])]
    images: Any = processor.image_processor
    expected = images(pictures, return_tensors="pt")
    try:
        made = byte_processor(processor).image_processor(pictures, return_tensors="pt")
        found = with_pixel_values(with_scale(dict(made), processor))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    return set(found) == set(expected) and all(torch.equal(found[name], value) for name, value in expected.items())


def byte_processor(processor: ProcessorMixin) -> ProcessorMixin:
    """Return a copy of a processor for which `keeps_bytes`, whose `pixel_values` are bytes, each patch once.

    What comes after opening the images is replaced on the copy's image processor alone; the processor stays as it was.
    """
    images: Any = copy.copy(processor.image_processor)
    vars(images)["_preprocess"] = partial(_preprocess, images)
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


def _preprocess(
    processor: Any,
    images: Sequence[Tensor],
    *,
    do_resize: bool,
    size: Any,
    resample: Any,
    patch_size: int,
    merge_size: int,
    **_: Any,
) -> BatchFeature:
    """Resize images (channels, height, width) as the processor does, and cut all into one tensor of patches.

    Each is written where it belongs at once: pieces that are put together later are as many bytes moved again.
    """
    from transformers import BatchFeature

    factor = patch_size * merge_size
    resized = [
        processor.resize(images=image[None], size=size, resample=resample, factor=factor)[0] if do_resize else image
        for image in images
    ]
    grids = [(1, image.shape[1] // patch_size, image.shape[2] // patch_size) for image in resized]
    counts = [rows * columns for _, rows, columns in grids]
    channels = resized[0].shape[0]
    patches = torch.empty(sum(counts), channels * patch_size**2, dtype=torch.uint8)
    for image, place in zip(resized, patches.split(counts), strict=True):
        _cut(image, place, patch_size, merge_size)
    return BatchFeature({"pixel_values": patches, "image_grid_thw": torch.tensor(grids, dtype=torch.int64)})


def _cut(image: Tensor, patches: Tensor, patch_size: int, merge_size: int) -> None:
    """Write an image (channels, height, width) to patches (count, channels · side²), those to be merged adjacent.

    Straight from interleaved pixels, which is how an image comes out of Pillow and of the resize: planes in between
    would let whole rows of a patch be moved at once, and cost more than that saves.
    """
    rows, columns = (side // patch_size for side in image.shape[1:])
    cut = image.unflatten(2, (columns // merge_size, merge_size, patch_size))
    cut = cut.unflatten(1, (rows // merge_size, merge_size, patch_size))
    ordered = cut.permute(1, 4, 2, 5, 0, 3, 6)  # row, column, row in merge, column in merge, channel, y, x
    patches.view(ordered.shape).copy_(ordered)
