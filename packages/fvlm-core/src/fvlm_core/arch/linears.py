"""Every linear layer of a model, with the tower it lies in and the part it plays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fvlm_core.arch.facts import ArchFacts, Part, Tower
from fvlm_core.arch.tree import ends_in, is_under, plain_modules
from fvlm_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class LinearModule:
    """One linear layer.

    Attributes:
        name: its dotted name in the task model, without what PEFT puts around it.
        tower: where it lies.
        part: what it does there; always "other" outside the blocks (a merger's feed-forward net, the head).
        block: the number of its block in the tower, counted from 0 in the order of execution over all of the tower's
            lists of blocks; None outside them.
        parameters: of the weight and the bias; a 4-bit weight counts as what it stands for.
    """

    name: str
    tower: Tower
    part: Part
    block: int | None
    parameters: int


def linear_modules(model: nn.Module, facts: ArchFacts) -> list[LinearModule]:
    """List every ``nn.Linear`` (bitsandbytes' 4- and 8-bit layers are such) in the order of the module tree.

    The model may be wrapped by PEFT. The projection inside torch's own ``nn.MultiheadAttention`` is left out: that
    module reads its weight and never calls it, so an adapter on it would do nothing.

    Raises:
        CheckpointError: a linear lies in none of the towers that the facts name.
    """
    from torch import nn

    starts = _block_starts(model, facts)
    found: list[LinearModule] = []
    inert: set[str] = set()
    for name, module in plain_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            inert.add(f"{name}.out_proj")
        if not isinstance(module, nn.Linear) or name in inert:
            continue
        tower = tower_of(name, facts)
        if tower is None:
            raise CheckpointError(
                f"The linear layer {name!r} lies in no tower that the facts of {facts.model_type!r} name: add it to "
                "its file in fvlm_core/arch."
            )
        parameters = module.in_features * module.out_features + (0 if module.bias is None else module.out_features)
        block = _block_of(name, starts)
        part = "other" if block is None else part_of(name, facts)
        found.append(LinearModule(name, tower, part, block, parameters))
    return found


def tower_of(name: str, facts: ArchFacts) -> Tower | None:
    """Return the tower with the longest path above a module, or None."""
    best: tuple[int, Tower] | None = None
    for tower, paths in facts.towers().items():
        for path in paths:
            if is_under(name, path) and (best is None or len(path) > best[0]):
                best = (len(path), tower)
    return None if best is None else best[1]


def part_of(name: str, facts: ArchFacts) -> Part:
    """Return what a linear inside a block does; the longest ending that the facts list decides."""
    endings: list[tuple[int, Part]] = [(len(end), "attention") for end in facts.attention if ends_in(name, end)]
    endings += [(len(end), "mlp") for end in facts.mlp if ends_in(name, end)]
    return max(endings)[1] if endings else "other"


def _block_starts(model: nn.Module, facts: ArchFacts) -> dict[str, int]:
    """Map every list of blocks to the number of its first block."""
    sizes = {name: len(list(module.children())) for name, module in plain_modules(model)}
    starts: dict[str, int] = {}
    for lists in facts.layers.values():
        start = 0
        for path in lists:
            starts[path] = start
            start += sizes.get(path, 0)
    return starts


def _block_of(name: str, starts: dict[str, int]) -> int | None:
    for path, start in starts.items():
        if name.startswith(f"{path}."):
            return start + int(name[len(path) + 1 :].split(".", 1)[0])
    return None
