"""A model or an adapter, loaded to answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from fvlm_core.checkpoint import ADAPTER_CONFIG, find_source, read_config
from fvlm_core.errors import CheckpointError
from fvlm_core.quantized import stored_precision

if TYPE_CHECKING:
    from transformers import ProcessorMixin

logger = logging.getLogger(__name__)

Precision = Literal["4bit", "8bit", "16bit"]
OPTIONS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True},
    "8bit": {"load_in_8bit": True},
    "16bit": {"load_in_16bit": True},
    "as stored": {},
}


def load_to_answer(
    name: str,
    precision: Precision | None = None,
    *,
    trust_remote_code: bool = False,
    max_seq_length: int = 2048,
    **options: Any,
) -> tuple[Any, ProcessorMixin]:
    """Load a model, or an adapter on its base, in inference mode.

    Args:
        name: folder or Hub id.
        precision: of the (base) weights; None: as they are stored.
        trust_remote_code: run model code that the checkpoint brings along.
        max_seq_length: kept as the model's.
        **options: more of `FastVisionModel.from_pretrained`.

    Raises:
        CheckpointError: it is missing, damaged, or of a kind that cannot be loaded.
        ConfigError: it is stored quantized, in another precision than the one asked for.
    """
    from fvlm_vision import FastVisionModel

    key = precision or ("as stored" if _is_quantized(name, trust_remote_code) else "16bit")
    model, processor = FastVisionModel.from_pretrained(
        name,
        max_seq_length=max_seq_length,
        use_gradient_checkpointing=False,
        trust_remote_code=trust_remote_code,
        **OPTIONS[key],
        **options,
    )
    FastVisionModel.for_inference(model)
    return model, processor


def is_adapter(name: str) -> bool:
    """Tell whether a folder or Hub id holds an adapter."""
    return find_source(name).json(ADAPTER_CONFIG) is not None


def quiet_libraries(debug: bool) -> None:
    """Keep transformers' own bars and remarks out of a verb's output."""
    from transformers.utils import logging as remarks

    remarks.disable_progress_bar()
    if not debug:
        remarks.set_verbosity_error()


def _is_quantized(name: str, trust_remote_code: bool) -> bool:
    source = find_source(name)
    adapter = source.json(ADAPTER_CONFIG)
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise CheckpointError(f"{ADAPTER_CONFIG} of {name!r} names no base_model_name_or_path; write it there.")
        source = find_source(base, adapter.get("revision"))
    return stored_precision(read_config(source, trust_remote_code), source.name) is not None
