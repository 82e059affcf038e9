"""Which families can be trained on several samples in one row, and what their batches need for it.

A packed row has no padding and no attention mask: transformers sees from positions that start again where a sample
starts, and lets no token attend to another sample. That holds for a family only if its model hands the positions to
the mask of its text layers and has no other way from token to token. So this is a list of what has been compared with
padded batches (loss and every gradient), not a guess: what it does not name is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fvlm_core.errors import ConfigError
from fvlm_core.versions import mixes_up_packed_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What a family's packed batch looks like.

    Attributes:
        axes: rotary axes of its positions. With 1 they have the shape (1, tokens); with more, (1 + axes, 1, tokens),
            where the first row counts tokens and is what the mask is made of.
        images_by_row: tensors that hold the images as (batch, images, …) and not one after the other.
    """

    axes: int = 1
    images_by_row: tuple[str, ...] = ()


_PACKED: dict[str, Packing] = {
    "qwen2_vl": Packing(axes=3),
    "qwen2_5_vl": Packing(axes=3),
    "qwen3_vl": Packing(axes=3),
    "llava": Packing(),
    "mistral3": Packing(),
    "gemma3": Packing(),
    "llava_onevision": Packing(),
    "internvl": Packing(),
    "idefics3": Packing(images_by_row=("pixel_values", "pixel_attention_mask")),
    "smolvlm": Packing(images_by_row=("pixel_values", "pixel_attention_mask")),
}
"""Model type → how it is packed."""

_TEXT_TYPES = frozenset(
    {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "gemma3_text", "llama", "mistral", "qwen2"}
)
"""Text models that have been compared; the types above wrap others too."""

_REFUSED: dict[str, str] = {
    "mllama": "text before an image attends to every image row there is, so it would see other samples' images",
    "paligemma": "its prefix attends both ways over the whole row, so it would see other samples",
}


def packing_of(model: PreTrainedModel) -> Packing:
    """Return how batches of a task model are packed.

    Args:
        model: the model, not wrapped by PEFT (`fvlm_core.arch.task_model`).

    Raises:
        ConfigError: its family cannot be packed or has not been compared, or its attention makes no mask from
            positions.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    model_type = model.config.model_type
    if model_type in _REFUSED:
        raise ConfigError(
            f"packing=True cannot be used with {model_type!r}: {_REFUSED[model_type]}; leave packing out."
        )
    if model_type == "gemma3" and mixes_up_packed_images():
        raise ConfigError(
            "packing=True cannot be used with 'gemma3' and transformers 5.23 or newer, which mixes up the images of "
            "packed samples; leave packing out, or install an older transformers."
        )
    text = model.config.get_text_config()
    found = _PACKED.get(model_type)
    if found is None or text.model_type not in _TEXT_TYPES:
        raise ConfigError(
            f"packing=True cannot be used with {model_type!r} around {text.model_type!r}: no test holds its packed "
            "loss against the padded one; leave packing out."
        )
    if text._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ConfigError(
            f"packing=True cannot be used with attn_implementation={text._attn_implementation!r}, which is given no "
            "mask; load the model with 'sdpa' or 'flash_attention_2'."
        )
    return found
