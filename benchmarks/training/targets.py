"""What every stack leaves in 16 bit and puts adapters on: the same, or their figures would not compare."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig

from fvlm_core.arch import facts_for, linear_modules
from fvlm_core.quantized import build_skeleton


@dataclass(frozen=True)
class Choice:
    """Names of modules.

    Attributes:
        unquantized: what 4-bit loading skips.
        targets: the attention and MLP linears of the vision and language towers; no projector, no head.
    """

    unquantized: list[str]
    targets: list[str]


def choose(folder: str) -> Choice:
    """Return what FVLM's defaults choose for a checkpoint, for stacks that must be told by name."""
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder))
    facts = facts_for(skeleton)
    targets = [
        linear.name
        for linear in linear_modules(skeleton, facts)
        if linear.tower in ("vision", "language") and linear.part in ("attention", "mlp")
    ]
    return Choice(list(facts.unquantized), targets)
