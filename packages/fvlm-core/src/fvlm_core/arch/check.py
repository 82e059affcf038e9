"""Holding a family's facts against a real module tree: an entry that matches nothing is an error, not a no-op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fvlm_core.arch.facts import ArchFacts
from fvlm_core.arch.linears import linear_modules
from fvlm_core.arch.tree import ends_in, is_under, plain_modules
from fvlm_core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_facts(model: PreTrainedModel, facts: ArchFacts) -> None:
    """Check that every entry of the facts matches something in a model.

    Raises:
        CheckpointError: one does not; the message names it.
    """
    modules = {name for name, _ in plain_modules(model)}
    paths: list[tuple[str, str]] = [(tower, path) for tower, group in facts.towers().items() for path in group]
    paths += [(f"layers[{tower!r}]", path) for tower, lists in facts.layers.items() for path in lists]
    for entry, path in paths:
        if path not in modules:
            raise _nothing(facts, entry, path)
    linears = [linear.name for linear in linear_modules(model, facts)]
    for part, ending in [("attention", end) for end in facts.attention] + [("mlp", end) for end in facts.mlp]:
        if not any(ends_in(name, ending) for name in linears):
            raise _nothing(facts, part, ending)
    for path in facts.unquantized:
        if not any(is_under(name, path) for name in linears):
            raise _nothing(facts, "unquantized", path)
    fields = (*facts.media.image, *facts.media.video, *facts.media.framing)
    for name in fields:
        if not hasattr(model.config, name):
            raise _nothing(facts, "media", name)


def _nothing(facts: ArchFacts, entry: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"The facts of {facts.model_type!r} name {value!r} ({entry}), which this model does not have: load the model "
        "with its language-modelling head, or mend the family's file in fvlm_core/arch for this transformers version."
    )
