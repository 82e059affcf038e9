"""What is true of each model family: towers, linears, what stays in 16 bit, media tokens.

Written facts are found by ``config.model_type`` in one table (`fvlm_core.arch.lookup.TABLE`); anything else gets facts
derived from its module tree and config. docs/add-a-model.md says how to add a family.
"""

from __future__ import annotations

from fvlm_core.arch.check import check_facts
from fvlm_core.arch.facts import PARTS, TOWERS, ArchFacts, MediaTokens, Part, Tower
from fvlm_core.arch.generic import derive_facts
from fvlm_core.arch.linears import LinearModule, linear_modules, part_of, tower_of
from fvlm_core.arch.lookup import TABLE, facts_by_type, facts_for
from fvlm_core.arch.media import MediaTokenIds, media_token_ids
from fvlm_core.arch.tree import plain_modules, task_model

__all__ = [
    "PARTS",
    "TABLE",
    "TOWERS",
    "ArchFacts",
    "LinearModule",
    "MediaTokenIds",
    "MediaTokens",
    "Part",
    "Tower",
    "check_facts",
    "derive_facts",
    "facts_by_type",
    "facts_for",
    "linear_modules",
    "media_token_ids",
    "part_of",
    "plain_modules",
    "task_model",
    "tower_of",
]
