"""A saved adapter folder: the base model it names, and the adapter attached to it, ready to be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fvlm_core.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Source, find_source, tensor_names
from fvlm_core.errors import CheckpointError
from fvlm_vision.lora import freeze_other_biases

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# Either of them says that a processor was saved beside an adapter; a tokenizer alone is not one.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's folder or repository, and the base it was trained on."""

    source: Source
    base: Source

    @property
    def has_processor(self) -> bool:
        """Whether a processor was saved beside the adapter."""
        return any(self.source.file(name) for name in _PROCESSOR_FILES)


def find_adapter(source: Source) -> SavedAdapter | None:
    """The adapter at ``source``; None where there is no ``adapter_config.json`` and it is a model.

    Raises:
        CheckpointError: it is no LoRA adapter, names no base or one that is not there, or has no safetensors weights.
    """
    config = source.json(ADAPTER_CONFIG)
    if config is None:
        return None
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"The adapter {source.name!r} is of type {config.get('peft_type')!r}, and only LoRA adapters can be loaded."
        )
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} of {source.name!r} names no base_model_name_or_path: write the base model's folder or "
            "Hub id there."
        )
    # A subfolder is the adapter's; the base is found by its own name and revision.
    hub = {key: value for key, value in source.hub.items() if key != "subfolder"}
    try:
        base_source = find_source(base, revision, source.token, **hub)
    except CheckpointError:
        raise CheckpointError(
            f"The adapter {source.name!r} was trained on {base!r}, and there is no such folder: bring it back, or "
            f"write its new place into base_model_name_or_path of {ADAPTER_CONFIG}."
        ) from None
    if source.file(ADAPTER_WEIGHTS) is None:
        raise CheckpointError(f"The adapter {source.name!r} has no {ADAPTER_WEIGHTS}: save it again as safetensors.")
    return SavedAdapter(source, base_source)


def attach_adapter(model: PreTrainedModel, adapter: SavedAdapter) -> PeftModel:
    """Put a saved adapter on its base model, trainable.

    Raises:
        CheckpointError: the adapter's weights are damaged or do not fit the model.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    weights = adapter.source.file(ADAPTER_WEIGHTS)
    stored = set(tensor_names(weights)) if weights is not None else set()
    try:
        attached = PeftModel.from_pretrained(model, adapter.source.name, is_trainable=True, **adapter.source.options)
    except (RuntimeError, TypeError, ValueError) as error:  # TypeError: its config has a value of another type
        raise CheckpointError(
            f"The adapter {adapter.source.name!r} does not fit its base {adapter.base.name!r} "
            f"({str(error).strip().splitlines()[-1].strip()}): check that the base is the one it was trained on."
        ) from None
    expected = set(get_peft_model_state_dict(attached))
    if expected != stored:
        odd = sorted(expected ^ stored)
        raise CheckpointError(
            f"The adapter {adapter.source.name!r} and its base {adapter.base.name!r} disagree in {len(odd)} tensors, "
            f"such as {odd[0]!r}: check that the base is the one it was trained on."
        )
    if cast("LoraConfig", attached.active_peft_config).bias == "all":
        freeze_other_biases(attached)
    return attached
