"""Checks of arguments that several files share."""

from __future__ import annotations

from typing import Any

from fvlm_core.errors import ConfigError


def check_processor(processor: Any) -> None:
    """Raise a `ConfigError` unless the processor handles images and its tokenizer can pad."""
    from transformers import ProcessorMixin

    if not isinstance(processor, ProcessorMixin) or "image_processor" not in processor.get_attributes():
        raise ConfigError(
            f"processor is a {type(processor).__name__}, which handles no images; pass the processor that "
            "FastVisionModel.from_pretrained returns beside the model."
        )
    if processor.tokenizer.pad_token_id is None:
        raise ConfigError(
            "the tokenizer has no padding token; set processor.tokenizer.pad_token, e.g. to its eos_token."
        )


def positive(name: str, value: int | None) -> int | None:
    """Return the value of the argument `name`, which must be None or a whole number of at least 1."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name}={value!r} is not a positive whole number.")
    return value
