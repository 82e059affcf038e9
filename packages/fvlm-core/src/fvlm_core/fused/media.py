"""Image features into the places of their tokens, without asking the device where or how many these are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvlm_core.fused.cache import NAMES
from fvlm_core.fused.kinds import kind_of
from fvlm_core.fused.texts import DEEP_FEATURES, DEEP_ROWS

MEDIA_ROWS = "media_rows"
"""Key of a batch that holds where the tokens of its images are, as the collator counted them."""
MEDIA_SIZES = "media_sizes"
"""Key of a batch that holds its images' heights and widths, as numbers: what `image_sizes` has on the device."""
PLACING = ("media_model", "deep_media_model", "pooled_media_model", "sized_media_model")
"""The kinds of models that take `MEDIA_ROWS`; the last of them takes `MEDIA_SIZES` as well."""
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
    features = _planned_features(module, kwargs).pooler_output
    return module.language_model(inputs_embeds=_placed(module, kwargs["input_ids"], rows, features), **_of_text(kwargs))


def deep_media_model_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Qwen3-VL without its head, whose text layers get image features of several depths; else as the above."""
    rows = kwargs.pop(MEDIA_ROWS, None)
    text = module.language_model
    if rows is None or args or not _is_planned(kwargs) or kind_of(text) != "text_model":
        return type(module).forward(module, *args, **kwargs)
    found = _planned_features(module, kwargs)
    deep = {DEEP_ROWS: rows, DEEP_FEATURES: found.deepstack_features}
    filled = _placed(module, kwargs["input_ids"], rows, found.pooler_output)
    return text(inputs_embeds=filled, **deep, **_of_text(kwargs))


def pooled_media_model_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Gemma 3 without its head; as its class does unless the batch brings `MEDIA_ROWS`."""
    rows = kwargs.pop(MEDIA_ROWS, None)
    if rows is None or args or not _has_images(module, kwargs):
        return type(module).forward(module, *args, **kwargs)
    features = module.get_image_features(kwargs.pop("pixel_values"), return_dict=True).pooler_output
    filled = _placed(module, kwargs.pop("input_ids"), rows, features.flatten(0, 1))
    return type(module).forward(module, **{**kwargs, "inputs_embeds": filled})


def sized_media_model_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Pixtral or Mistral 3 without its head; as its class does unless the batch brings all that it would ask for.

    Stock asks the device for the sizes of the images, to split the features by image, and Mistral 3 once more for each.
    """
    rows, sizes = kwargs.pop(MEDIA_ROWS, None), kwargs.pop(MEDIA_SIZES, None)
    if rows is None or sizes is None or args or not _has_images(module, kwargs) or not _takes_sizes(module, kwargs):
        return type(module).forward(module, *args, **kwargs)
    layer = module.config.vision_feature_layer
    tower = module.vision_tower(kwargs.pop("pixel_values"), image_sizes=sizes, output_hidden_states=True)
    states = [tower.hidden_states[place] for place in ([layer] if isinstance(layer, int) else layer)]
    chosen = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
    merges = hasattr(module.multi_modal_projector, "patch_merger")
    features = module.multi_modal_projector(chosen.squeeze(0), *([sizes] if merges else []))
    filled = _placed(module, kwargs.pop("input_ids"), rows, features)
    rest = {name: value for name, value in kwargs.items() if name != "image_sizes"}
    return type(module).forward(module, **{**rest, "inputs_embeds": filled})


def _placed(module: Any, ids: Tensor, rows: Tensor, features: Tensor) -> Tensor:
    """Return the embeddings of tokens with features, ``(rows, width)``, in the places of media tokens."""
    embeds: Tensor = module.get_input_embeddings()(ids)
    return embeds.flatten(0, 1).index_copy(0, rows, features.to(embeds.device, embeds.dtype)).view_as(embeds)


def _planned_features(module: Any, kwargs: dict[str, Any]) -> Any:
    planned = {
        name.removeprefix(_PREFIX): value
        for name, value in kwargs.items()
        if name.startswith(_PREFIX) and name not in _OWN
    }
    return module.visual(
        kwargs["pixel_values"].type(module.visual.dtype), grid_thw=kwargs["image_grid_thw"], return_dict=True, **planned
    )


def _of_text(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in kwargs.items() if name not in _OWN and not name.startswith((_PREFIX, "video_"))}


def _has_images(module: Any, kwargs: dict[str, Any]) -> bool:
    inside = module.config.image_token_id < module.config.get_text_config().vocab_size  # else its class embeds another
    given = all(kwargs.get(name) is not None for name in ("input_ids", "pixel_values"))
    return inside and given and kwargs.get("inputs_embeds") is None


def _takes_sizes(module: Any, kwargs: dict[str, Any]) -> bool:
    strategy = vars(module.config).get("vision_feature_select_strategy", "full")
    asked = any(kwargs.get(name) is not None for name in ("vision_feature_layer", "vision_feature_select_strategy"))
    return strategy == "full" and not asked and kind_of(module.vision_tower) == "packed_tower"


def _is_planned(kwargs: dict[str, Any]) -> bool:
    needed = ("input_ids", "position_ids", "pixel_values", "image_grid_thw")
    others = ("pixel_values_videos", "inputs_embeds", "mm_encoder_outputs", *NAMES)
    return all(kwargs.get(n) is not None for n in needed) and all(kwargs.get(n) is None for n in others)
