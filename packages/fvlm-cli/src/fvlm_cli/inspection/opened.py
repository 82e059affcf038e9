"""A model opened without its weights: its config, its module tree on the meta device, its facts, its processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlm_core.arch import ArchFacts, facts_for
from fvlm_core.checkpoint import Source, find_source, read_config
from fvlm_core.errors import CheckpointError
from fvlm_core.precision import Precision
from fvlm_core.quantized import build_skeleton, stored_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from fvlm_vision.adapter import SavedAdapter


@dataclass(frozen=True)
class Opened:
    """What is known of a checkpoint before any weight is read.

    Attributes:
        source: of the base model; of an adapter, the base that it names.
        adapter: the adapter that was named, or None for a model.
        config: the content of the base's ``config.json``.
        stored: the precision its weights are quantized in, or None.
        skeleton: the model on the meta device.
        facts: of its family.
        named: what was opened: the adapter's source, else the base's.
        trust_remote_code: whether the checkpoint's own code may run.
    """

    source: Source
    adapter: SavedAdapter | None
    config: dict[str, Any]
    stored: Precision | None
    skeleton: PreTrainedModel
    facts: ArchFacts
    named: Source
    trust_remote_code: bool

    def processor(self) -> ProcessorMixin:
        """Load the processor: the adapter's if it was saved with one, else the base's.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        from fvlm_vision.processor import load_processor

        return load_processor(self.named, self.adapter, self.trust_remote_code)


def open_model(
    name: str, trust_remote_code: bool = False, revision: str | None = None, token: str | None = None
) -> Opened:
    """Open a model, or the base of an adapter.

    Args:
        name: a folder or Hub id.
        trust_remote_code: whether the checkpoint's own code may run.
        revision: branch, tag or commit on the Hub.
        token: for gated repositories; passed on, never kept elsewhere.

    Raises:
        CheckpointError: there is no model there, or it is of a kind that cannot be loaded.
    """
    from fvlm_vision.adapter import find_adapter

    named = find_source(name, revision, token)
    adapter = find_adapter(named)
    source = named if adapter is None else adapter.base
    config = read_config(source, trust_remote_code)
    stored = stored_precision(config, source.name)
    skeleton = _skeleton(source, trust_remote_code)
    return Opened(source, adapter, config, stored, skeleton, facts_for(skeleton), named, trust_remote_code)


def _skeleton(source: Source, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options)
        return build_skeleton(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the config of {source.name!r} makes no vision-language model ({reason}).") from None
