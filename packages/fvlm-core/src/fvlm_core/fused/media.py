"""Image features into the places of their tokens, without asking the device where or how many these are."""

from __future__ import annotations

from typing import Any

from fvlm_core.fused.cache import NAMES

MEDIA_ROWS = "media_rows"
"""Key of a batch that holds where the tokens of its images are, as the collator counted them."""
_PREFIX = "image_"
_OWN = (
    *("input_ids", "inputs_embeds", "image_grid_thw", "video_grid_thw"),
    *("pixel_values", "pixel_values_videos", "mm_token_type_ids"),
)


def media_model_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a Qwen model without its head; as its class does unless the batch brings `MEDIA_ROWS` and all positions.

    Stock splits the features by image and compares their number with that of the places, which waits for the device
    twice, and a third time in the backward pass. The collator has compared them already.
    """
    rows = kwargs.pop(MEDIA_ROWS, None)
    if rows is None or args or not _is_planned(kwargs):
        return type(module).forward(module, *args, **kwargs)
    embeds = module.get_input_embeddings()(kwargs["input_ids"])
    planned = {
        name.removeprefix(_PREFIX): value
        for name, value in kwargs.items()
        if name.startswith(_PREFIX) and name not in _OWN
    }
    pixels = kwargs["pixel_values"].type(module.visual.dtype)
    features = module.visual(pixels, grid_thw=kwargs["image_grid_thw"], **planned).pooler_output
    filled = embeds.flatten(0, 1).index_copy(0, rows, features.to(embeds.device, embeds.dtype))
    rest = {name: v for name, v in kwargs.items() if name not in _OWN and not name.startswith((_PREFIX, "video_"))}
    return module.language_model(inputs_embeds=filled.view_as(embeds), **rest)


def _is_planned(kwargs: dict[str, Any]) -> bool:
    needed = ("input_ids", "position_ids", "pixel_values", "image_grid_thw")
    others = ("pixel_values_videos", "inputs_embeds", "mm_encoder_outputs", *NAMES)
    return all(kwargs.get(n) is not None for n in needed) and all(kwargs.get(n) is None for n in others)
