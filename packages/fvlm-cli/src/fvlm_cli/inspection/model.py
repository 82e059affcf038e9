"""What FVLM knows about a checkpoint, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvlm_core.arch import facts_for
from fvlm_core.checkpoint import ADAPTER_CONFIG, Source, find_source, read_config
from fvlm_core.errors import CheckpointError
from fvlm_core.quantized import build_skeleton, stored_precision

if TYPE_CHECKING:
    from torch import nn


def look_at(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """Describe a model: its type, whether facts are written for it, its towers. Of an adapter, its base is described.

    Raises:
        CheckpointError: there is no model there, or it is of a kind that cannot be loaded.
    """
    source = _base_of(find_source(name))
    raw = read_config(source, trust_remote_code)
    stored = stored_precision(raw, source.name)
    skeleton = _skeleton(source, trust_remote_code)
    facts = facts_for(skeleton)
    paths = {"vision": facts.vision, "projector": facts.projector, "language": facts.language, "audio": facts.audio}
    return {
        "name": source.name,
        "model_type": facts.model_type,
        "known": not facts.generic,
        "quantized": None if stored is None else str(stored),
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "towers": {
            tower: {"paths": list(modules), "parameters": _parameters(skeleton, modules)}
            for tower, modules in paths.items()
            if modules
        },
        "unquantized": list(facts.unquantized),
    }


def _base_of(source: Source) -> Source:
    adapter = source.json(ADAPTER_CONFIG)
    if adapter is None:
        return source
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{ADAPTER_CONFIG} of {source.name!r} names no base_model_name_or_path; write it there.")
    return find_source(base, adapter.get("revision"))


def _skeleton(source: Source, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options)
        return build_skeleton(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the config of {source.name!r} makes no vision-language model ({reason}).") from None


def _parameters(model: nn.Module, paths: tuple[str, ...]) -> int:
    """Count the parameters below some modules, a shared one once."""
    found = {id(item): item.numel() for path in paths for item in model.get_submodule(path).parameters()}
    return sum(found.values())
