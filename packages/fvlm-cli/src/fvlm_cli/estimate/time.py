"""Seconds of an optimizer step: operations and bytes against the card's speed. docs/estimate.md has the assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fvlm_cli.estimate.gpus import Gpu
from fvlm_cli.estimate.memory import Held, Mode, flowing
from fvlm_cli.estimate.shapes import Block, Shapes
from fvlm_cli.estimate.workload import Load

EFFICIENCY = 0.5  # of the data sheet's speed that a step's matrix products reach
LAUNCH = 0.35e-3  # seconds of host time for one pass of one block with its adapters
_BYTES_DEQUANTIZED = 2.5  # read at half a byte, written at two, for a weight and a pass


@dataclass(frozen=True)
class Step:
    """An optimizer step.

    Attributes:
        operations: of matrix products and attention, recomputation included.
        seconds: expected.
        bound: what decides: "compute" or "launches".
    """

    operations: float
    seconds: float
    bound: str


def step(
    shapes: Shapes, rows: Sequence[Load], accumulation: int, gpu: Gpu, *, held: Held, mode: Mode, fused: bool
) -> Step:
    """Return the time of an optimizer step.

    Args:
        shapes: of the model with its adapters.
        rows: of a batch; they are padded to the longest.
        accumulation: batches a step.
        gpu: the card.
        held: how the base weights are held.
        mode: of gradient checkpointing.
        fused: whether only learned tokens reach the head.
    """
    tokens = len(rows) * max(row.tokens for row in rows)
    patches = sum(row.patches for row in rows)
    scored = sum(row.learned for row in rows) if fused else tokens
    count = {"vision": patches, "projector": patches // 4, "language": tokens, "head": scored}
    blocks = flowing(shapes)
    total = 0.0
    for part, units in count.items():
        weights = shapes.vocabulary * shapes.width if part == "head" else shapes.linears.get(part, 0)
        attention = _attention(shapes, rows, part)
        share = _share(shapes, blocks, part)
        again = share if mode != "none" and part in ("vision", "language") else 0.0
        # Backward: a product for the gradient of a layer's input, another for that of its weight; four of attention's.
        total += 2.0 * weights * units * (1 + share + again + (share if held == "full" else 0.0))
        total += attention * (1 + 2 * share + again)
        if held != "full":
            total += 2.0 * shapes.trainable.get(part, 0) * units * (3 + (again > 0))
    passes = 2 if mode == "none" else 3
    moved = shapes.quantizable * _BYTES_DEQUANTIZED * passes if held == "4bit" else 0.0
    all_blocks = sum(len(found) for found in shapes.blocks.values())
    device = total / (gpu.tflops * 1e12 * EFFICIENCY) + moved / (gpu.bandwidth * 1e9)
    host = LAUNCH * (all_blocks + len(blocks) * (passes - 1))
    seconds = accumulation * max(device, host)
    return Step(total * accumulation, seconds, "compute" if device >= host else "launches")


def _share(shapes: Shapes, blocks: Sequence[tuple[str, Block]], part: str) -> float:
    """Return the share of a part that the gradient passes through."""
    if part in ("vision", "language"):
        own = shapes.blocks.get(part, [])  # type: ignore[call-overload]
        return sum(tower == part for tower, _ in blocks) / len(own) if own else 0.0
    if part == "head":
        return 1.0
    return 1.0 if any(tower == "vision" for tower, _ in blocks) or shapes.trainable.get("projector", 0) else 0.0


def _attention(shapes: Shapes, rows: Sequence[Load], part: str) -> float:
    """Return the operations of a forward pass of attention: scores, and their product with the values."""
    if part == "vision":
        return sum(4.0 * row.spans * block.query for row in rows for block in shapes.blocks.get("vision", []))
    if part != "language":
        return 0.0
    length = max(row.tokens for row in rows)
    # Half of it is masked by causality.
    return sum(2.0 * len(rows) * length * length * block.query for block in shapes.blocks.get("language", []))
