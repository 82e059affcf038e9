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
        total = cls()
        for batch in batches:
            rows, length = batch["input_ids"].shape
            total.tokens += rows * length
            total.squares += rows * length**2
            total.learned += int((batch["labels"][:, 1:] != -100).sum())
            sizes = _patches(batch, config.to_dict().get("vision_config", {}))
            total.patches += sum(sizes)
            total.spans += sum(_span(size, config.to_dict().get("vision_config", {})) for size in sizes)
        return cls(**{name: value / steps for name, value in asdict(total).items()})


def _patches(batch: Mapping[str, Any], vision: Mapping[str, Any]) -> list[int]:
    """Return the patches of each piece that attends to itself alone: an image, in most families."""
    if "image_grid_thw" in batch:
        return [int(t) * int(h) * int(w) for t, h, w in batch["image_grid_thw"].tolist()]
    pixels, side = batch["pixel_values"], vision["patch_size"]
    height, width = (side, side) if isinstance(side, int) else side
    if pixels.dim() == 4 and "image_sizes" in batch:  # padded to the largest
        return [int(h) // height * (int(w) // width) for h, w in batch["image_sizes"].tolist()]
    each = pixels.shape[-2] // height * (pixels.shape[-1] // width)
    if pixels.dim() == 6:  # tiles of an image attend to each other
        return [each * pixels.shape[2]] * (pixels.shape[0] * pixels.shape[1])
    return [each] * (pixels.numel() // (pixels.shape[-1] * pixels.shape[-2] * pixels.shape[-3]))


def _span(patches: int, vision: Mapping[str, Any]) -> float:
    """Return an image's patches squared; where most blocks attend in windows (Qwen2.5-VL), the blocks' mean."""
    whole = vision.get("fullatt_block_indexes")
    if whole is None:
        return patches**2
    window = min(patches, (vision["window_size"] // vision["patch_size"]) ** 2)
    share = len(whole) / vision["depth"]
    return patches * (share * patches + (1 - share) * window)


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
