"""What FVLM knows about a checkpoint, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvlm_cli.inspection.opened import open_model

if TYPE_CHECKING:
    from torch import nn


def look_at(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """Describe a model: its type, whether facts are written for it, its towers. Of an adapter, its base is described.

    Raises:
        CheckpointError: there is no model there, or it is of a kind that cannot be loaded.
    """
    opened = open_model(name, trust_remote_code)
    facts, skeleton = opened.facts, opened.skeleton
    paths = {"vision": facts.vision, "projector": facts.projector, "language": facts.language, "audio": facts.audio}
    return {
        "name": opened.source.name,
        "model_type": facts.model_type,
        "known": not facts.generic,
        "quantized": None if opened.stored is None else str(opened.stored),
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "towers": {
            tower: {"paths": list(modules), "parameters": _parameters(skeleton, modules)}
            for tower, modules in paths.items()
            if modules
        },
        "unquantized": list(facts.unquantized),
    }


def _parameters(model: nn.Module, paths: tuple[str, ...]) -> int:
    """Count the parameters below some modules, a shared one once."""
    found = {id(item): item.numel() for path in paths for item in model.get_submodule(path).parameters()}
    return sum(found.values())
