"""The processor that belongs to a model, and the longest sample that the model takes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fvlm_core.errors import CheckpointError, ConfigError
from fvlm_vision.arguments import is_positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from fvlm_core.checkpoint import Source
    from fvlm_vision.adapter import SavedAdapter

logger = logging.getLogger(__name__)


def load_processor(source: Source, adapter: SavedAdapter | None, trust_remote_code: bool) -> ProcessorMixin:
    """The processor of a checkpoint; that of an adapter if it was saved with one, else that of its base.

    Raises:
        CheckpointError: there is none, or what is there is not one of images and text.
    """
    from transformers import AutoProcessor, ProcessorMixin

    if adapter is not None and not adapter.has_processor:
        source = adapter.base
    try:
        processor = AutoProcessor.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # each of them for a damaged file
        raise CheckpointError(
            f"The processor of {source.name!r} cannot be loaded ({' '.join(str(error).split())}): save the processor "
            "into the same folder as the model."
        ) from None
    if not isinstance(processor, ProcessorMixin):  # transformers falls back to a tokenizer alone
        raise CheckpointError(
            f"{source.name!r} has a {type(processor).__name__} and no processor for images: save the model's "
            "processor into the same folder."
        )
    # Without its files transformers makes up a tokenizer that knows its special tokens and no others.
    if len(processor.tokenizer) <= len(processor.tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{source.name!r} has a processor without its tokenizer's files: save the processor into that folder again."
        )
    return processor


def check_length(max_seq_length: Any, model: PreTrainedModel | None = None) -> None:
    """Check the length of the longest sample, against the model's position limit where a model is given.

    A length above the limit is warned of and kept: rotary positions go on beyond it, with a quality that is not known.

    Raises:
        ConfigError: it is not a whole number of at least 1.
    """
    if not is_positive(max_seq_length):
        raise ConfigError(
            f"max_seq_length={max_seq_length!r} is not a number of tokens: pass a whole number of at least 1."
        )
    if model is None:
        return
    limit = vars(model.config.get_text_config()).get("max_position_embeddings")
    if isinstance(limit, int) and max_seq_length > limit:
        logger.warning(
            "max_seq_length=%d is above the %d positions that %s was made for: samples beyond them may train badly.",
            max_seq_length,
            limit,
            model.config.model_type,
        )
