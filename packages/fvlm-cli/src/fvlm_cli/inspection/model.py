"""What FVLM knows about a checkpoint, from its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fvlm_cli.inspection.accelerations import accelerations
from fvlm_cli.inspection.opened import open_model

if TYPE_CHECKING:
    from torch import nn


def look_at(name: str, trust_remote_code: bool, devices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe a model: its type, its towers, and which accelerations apply. Of an adapter, its base is described.

    Args:
        name: a folder or Hub id.
        trust_remote_code: whether the checkpoint's own code may run.
        devices: as `machine` describes them.

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
        "accelerations": [asdict(item) for item in accelerations(opened, devices)],
    }


def _parameters(model: nn.Module, paths: tuple[str, ...]) -> int:
    """Count the parameters below some modules, a shared one once."""
    found = {id(item): item.numel() for path in paths for item in model.get_submodule(path).parameters()}
    return sum(found.values())
