"""How fast a step could be: its operations, at the speed that the card's own matrix product reaches.

Counted are matrix products and attention of one optimizer step as a trainer of adapters must do them that computes each
block again: forward, forward again, and the gradients of inputs (and of adapters); a head only over learned tokens; of
causal attention one half. Keys and values of cross-attention count once for a token of text. Stacks that recompute
less may come nearer to the limit than others, and one that keeps everything may pass it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.training.stacks import RANK
from transformers import AutoConfig

from fvlm_cli.estimate.shapes import read_shapes
from fvlm_cli.estimate.workload import patches_of, span_of
from fvlm_core.arch import facts_for, linear_modules
from fvlm_core.arch.tree import plain_modules
from fvlm_core.quantized import build_skeleton


@dataclass
class Counts:
    """What batches bring.

    Attributes:
        tokens: of text and images in the language model, padding included.
        squares: of the lengths of rows, summed.
        learned: tokens that the loss is of.
        patches: in the vision tower.
        spans: of the patches that attend to each other, the squares, summed.
    """

    tokens: float = 0
    squares: float = 0
    learned: float = 0
    patches: float = 0
    spans: float = 0

    @classmethod
    def of_step(cls, batches: Sequence[Mapping[str, Any]], config: Any, steps: float) -> Counts:
        """Return what a step brings, if batches make so many of them."""
        total, vision = cls(), config.to_dict().get("vision_config", {})
        for batch in batches:
            rows, length = batch["input_ids"].shape
            total.tokens += rows * length
            total.squares += rows * length**2
            total.learned += int((batch["labels"][:, 1:] != -100).sum())
            sizes = patches_of(batch, vision)
            total.patches += sum(sizes)
            total.spans += sum(span_of(size, vision) for size in sizes)
        return cls(**{name: value / steps for name, value in asdict(total).items()})


def operations(folder: str, step: Counts) -> float:
    """Return the operations of an optimizer step on a checkpoint."""
    skeleton = build_skeleton(AutoConfig.from_pretrained(folder))
    facts = facts_for(skeleton)
    shapes = read_shapes(skeleton, facts)
    merged = skeleton.config.to_dict().get("vision_config", {}).get("spatial_merge_size", 1) ** 2
    units = {"vision": step.patches, "projector": step.patches / merged, "language": step.tokens}
    products = 2 * 2.0 * shapes.vocabulary * shapes.width * step.learned
    modules: dict[str, Any] = dict(plain_modules(skeleton))
    for linear in linear_modules(skeleton, facts):
        if linear.tower not in units:
            continue
        passes = 3 if linear.block is not None else 2
        products += 2.0 * linear.parameters * units[linear.tower] * passes
        if linear.tower in ("vision", "language") and linear.part in ("attention", "mlp"):
            weight = modules[linear.name]
            products += 2.0 * RANK * (weight.in_features + weight.out_features) * units[linear.tower] * 4
    attended = {"vision": 4.0 * step.spans, "language": 2.0 * step.squares}
    attention = sum(pairs * block.query for tower, pairs in attended.items() for block in shapes.blocks[tower])
    return products + 4 * attention
