"""Checks of arguments that several files share."""

from __future__ import annotations

from typing import Any, TypeGuard

from fvlm_core.errors import ConfigError
from fvlm_core.options import check_flag


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
    if value is not None and not is_positive(value):
        raise ConfigError(f"{name}={value!r} is not a positive whole number.")
    return value


def is_integer(value: Any) -> TypeGuard[int]:
    """Tell whether a value is a whole number, which True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> TypeGuard[int]:
    """Tell whether a value is a whole number of at least 1."""
    return is_integer(value) and value >= 1


def check_collator(
    flags: dict[str, Any],
    overflow: Any,
    formatting_func: Any,
    ignore_index: Any,
    plan_loss: Any,
    url_limits: Any,
    video_options: Any,
) -> None:
    """Check the collator's arguments that would be taken for what they are not, or fail only at the first sample.

    Args:
        flags: what is True or False, by name.
        overflow, formatting_func, ignore_index, plan_loss, url_limits, video_options: as the collator was given them.

    Raises:
        ConfigError: one is of the wrong kind.
    """
    from fvlm_vision.fetch import FetchLimits
    from fvlm_vision.truncation import OVERFLOWS
    from fvlm_vision.video import VideoOptions

    if overflow not in OVERFLOWS:
        raise ConfigError(f"overflow={overflow!r} is none of {', '.join(OVERFLOWS)}.")
    if formatting_func is not None and not callable(formatting_func):
        raise ConfigError(f"formatting_func={formatting_func!r} cannot be called; pass a function of one sample.")
    if not is_integer(ignore_index):
        raise ConfigError(f"ignore_index={ignore_index!r} is not a label; pass a whole number, such as -100.")
    for name, value in flags.items():
        check_flag(name, value)
    if plan_loss is not None:
        check_flag("plan_loss", plan_loss)
    for name, value, kind in (("url_limits", url_limits, FetchLimits), ("video_options", video_options, VideoOptions)):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name}={value!r} is not a {kind.__name__}; pass one, or None.")
