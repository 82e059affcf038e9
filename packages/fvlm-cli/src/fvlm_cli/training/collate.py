"""The `data` section of a config → the collator that training uses, and every verb that says what training will see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fvlm_cli.config.schema import DataSection
from fvlm_vision import FastVisionDataCollator

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, ProcessorMixin

    from fvlm_cli.generate.answer import Answerer, Decoding


def build_collator(
    data: DataSection, model: PreTrainedModel | PeftModel, processor: ProcessorMixin, *, packing: bool = False
) -> FastVisionDataCollator:
    """Return the collator.

    Args:
        data: the config's section.
        model: the model, which may be on the meta device: its config, module names and `max_seq_length` are read.
        processor: its processor.
        packing: whether batches are packed; what becomes of a single row is the same without.

    Raises:
        ConfigError: a key of the section cannot be used with this model.
    """
    limit: dict[str, Any] = {} if data.max_image_pixels is None else {"max_image_pixels": data.max_image_pixels}
    return FastVisionDataCollator(
        cast("PreTrainedModel", model),  # a PeftModel passes for the model that it wraps
        processor,
        train_on_responses_only=data.train_on_responses_only,
        instruction_part=data.instruction_part,
        response_part=data.response_part,
        resize=tuple(data.resize) if isinstance(data.resize, list) else data.resize,  # type: ignore[arg-type]
        packing=packing,
        overflow=data.overflow,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        allow_urls=data.allow_urls,
        **limit,
    )


def build_answerer(data: DataSection, model: Any, processor: ProcessorMixin, decoding: Decoding) -> Answerer:
    """Return what puts questions to a model with their images opened and sized as in training.

    Raises:
        ConfigError: a key of the section cannot be used with this model.
    """
    from fvlm_cli.generate.answer import Answerer
    from fvlm_vision.media import MAX_IMAGE_PIXELS, ImageReader
    from fvlm_vision.resize import resize_policy

    size = (model.config.to_dict().get("vision_config") or {}).get("image_size")
    policy = resize_policy(
        tuple(data.resize) if isinstance(data.resize, list) else data.resize,  # type: ignore[arg-type]
        data.min_pixels,
        data.max_pixels,
        processor=processor,
        image_size=size if isinstance(size, int) else None,
    )
    reader = ImageReader(data.max_image_pixels or MAX_IMAGE_PIXELS, data.allow_urls)
    return Answerer(model, processor, decoding, reader, policy)
