"""Model type → facts: an explicit table, one line a family, and the generic path for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fvlm_core.arch import gemma3, llava, mistral3, mllama, qwen2_5_vl, qwen2_vl, qwen3_vl
from fvlm_core.arch.check import check_facts
from fvlm_core.arch.facts import ArchFacts
from fvlm_core.arch.generic import derive_facts
from fvlm_core.arch.tree import task_model

if TYPE_CHECKING:
    from torch import nn

TABLE: dict[str, ArchFacts] = {
    "qwen2_vl": qwen2_vl.FACTS,
    "qwen2_5_vl": qwen2_5_vl.FACTS,
    "qwen3_vl": qwen3_vl.FACTS,
    "mllama": mllama.FACTS,
    "llava": llava.FACTS,
    "mistral3": mistral3.FACTS,
    "gemma3": gemma3.FACTS,
}


def facts_by_type(model_type: str, vision_type: str | None = None) -> ArchFacts | None:
    """Return the written facts of a model type, or None when there are none and they must be derived.

    Args:
        model_type: ``config.model_type``.
        vision_type: ``config.vision_config.model_type``; decides for a type that wraps many towers (``"llava"``).
    """
    facts = TABLE.get(model_type)
    if facts is None or facts.vision_type not in (None, vision_type):
        return None
    return facts


def facts_for(model: nn.Module) -> ArchFacts:
    """Return the facts of a loaded model (or of one on the meta device), wrapped by PEFT or not.

    Written facts are held against the model's module tree; without any, facts are derived from that tree and the
    config, with ``generic=True``.

    Raises:
        CheckpointError: an entry of the written facts matches nothing in this model, or one of its linears lies in
            none of their towers.
    """
    inner = task_model(model)
    facts = TABLE.get(inner.config.model_type)
    if facts is not None and facts.vision_type not in (None, inner.config.vision_config.model_type):
        facts = None
    if facts is None:
        return derive_facts(inner)
    check_facts(inner, facts)
    return facts
