"""Between training and inference, and back to exactly what was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvlm_core.checkpointing import resume_checkpointing, suspend_checkpointing
from fvlm_core.decoding import disable_decoding, enable_decoding
from fvlm_core.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def for_training(model: PreTrainedModel | PeftModel) -> None:
    """Train mode, the checkpointing mode the model was given, no key-value cache, no recorded decoding.

    Raises:
        ConfigError: it is no model.
    """
    _check(model)
    disable_decoding(model)
    model.train()
    resume_checkpointing(model)
    _use_cache(model, False)


def for_inference(model: PreTrainedModel | PeftModel) -> None:
    """Evaluation mode, no checkpointing, with the key-value cache; decoding by recordings where that is possible.

    Raises:
        ConfigError: it is no model.
    """
    _check(model)
    model.eval()
    suspend_checkpointing(model)
    _use_cache(model, True)
    enable_decoding(model)


def _check(model: Any) -> None:
    """Raise a `ConfigError` unless it is a model of transformers or PEFT."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ConfigError(f"model is a {type(model).__name__}: pass the model that from_pretrained returned.")


def _use_cache(model: Any, use: bool) -> None:
    # The language model reads its own config; some families' top model reads the outer one.
    text = model.config.get_text_config()
    text.use_cache = use
    if "use_cache" in vars(model.config):
        model.config.use_cache = use
    if model.generation_config is not None:
        model.generation_config.use_cache = use
