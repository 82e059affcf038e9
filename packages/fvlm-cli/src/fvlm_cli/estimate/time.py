"""Seconds of an optimizer step: operations and bytes against the card's speed. docs/estimate.md has the assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fvlm_cli.estimate.activations import Batch, flowing, saved
from fvlm_cli.estimate.gpus import Gpu
from fvlm_cli.estimate.memory import Way
from fvlm_cli.estimate.shapes import Block, Shapes
from fvlm_cli.estimate.workload import Load

PRODUCTS = 0.6  # of the data sheet's speed that matrix products reach
ATTENTION = 0.35  # that flash attention reaches, whose backward pass takes 2.5 times the operations of its forward pass
BANDWIDTH = 0.85  # of the data sheet's that copies reach
KERNEL = 2.5e-6  # seconds between the starts of two small kernels of a recording
_BYTES_DEQUANTIZED = 2.5  # read at half a byte, written at two, for a weight and a pass

# For one pass of one block: kernels, and seconds of host time for the start of one outside of a recording. Both are of
# docs/performance.md: 18,900 (plain) and 9,600 (fused) launches for three passes of 60 blocks; hosts differ widely.
_KERNELS = {False: 105, True: 53}
LAUNCH = 30e-6
REPLAY = 150e-6  # seconds of host time for one pass of one recorded block


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


@dataclass
class _Work:
    """What a batch has to do: operations of matrix products and of attention, and bytes moved."""

    products: float = 0.0
    attention: float = 0.0
    attention_at_speed: float = 0.0  # with the backward pass as flash attention does it
    moved: float = 0.0


def step(shapes: Shapes, rows: Sequence[Load], gpu: Gpu, way: Way) -> Step:
    """Return the time of an optimizer step.

    Args:
        shapes: of the model with its adapters.
        rows: of a batch; they are padded to the longest.
        gpu: the card.
        way: how the model is held and trained.
    """
    recomputes = way.mode in ("recompute", "offload")
    work = _work(shapes, rows, way, recomputes)
    passes = 3 if recomputes else 2
    blocks, carrying = sum(len(found) for found in shapes.blocks.values()), len(flowing(shapes))
    runs = blocks + carrying * (passes - 1)  # of one block, forward or backward
    recorded = way.fused and way.mode != "none"
    kernels = runs * _KERNELS[way.fused]
    device = (
        work.products / (gpu.tflops * 1e12 * PRODUCTS)
        + work.attention_at_speed / (gpu.tflops * 1e12 * ATTENTION)
        + work.moved / (gpu.bandwidth * 1e9 * BANDWIDTH)
        + kernels * KERNEL
    )
    host = runs * REPLAY if recorded else kernels * LAUNCH
    seconds = way.accumulation * max(device, host)
    operations = (work.products + work.attention) * way.accumulation
    return Step(operations, seconds, "compute" if device >= host else "launches")


def _work(shapes: Shapes, rows: Sequence[Load], way: Way, recomputes: bool) -> _Work:
    tokens = len(rows) * max(row.tokens for row in rows)
    patches = sum(row.patches for row in rows)
    scored = sum(row.learned for row in rows) if way.fused else tokens
    count = {"vision": patches, "projector": patches // 4, "language": tokens, "head": scored}
    blocks = flowing(shapes)
    work = _Work()
    for part, units in count.items():
        weights = shapes.vocabulary * shapes.width if part == "head" else shapes.linears.get(part, 0)
        attention = _attention(shapes, rows, part)
        share = _share(shapes, blocks, part)
        again = share if recomputes and part in ("vision", "language") else 0.0
        left_out = _left_out(blocks, part) if again and way.fused else 0
        attended = 0.0 if _comes_back(rows, part, way) else again
        # Backward: a product for the gradient of a layer's input, another for that of its weight; four of attention's.
        work.products += 2.0 * weights * units * (1 + share + again + (share if way.held == "full" else 0.0))
        work.products -= 2.0 * left_out * units
        work.attention += attention * (1 + 2 * share + attended)
        work.attention_at_speed += attention * (1 + 2.5 * share + attended)
        if way.held != "full":
            work.products += 2.0 * shapes.trainable.get(part, 0) * units * (3 + (again > 0))
    passes = 3 if recomputes else 2
    if way.held == "4bit":
        work.moved += shapes.quantizable * _BYTES_DEQUANTIZED * passes
    work.moved += _traffic(shapes, Batch.of(rows), way, passes)
    return work


def _left_out(blocks: Sequence[tuple[str, Block]], part: str) -> int:
    """Return the weights of the last products of a part's blocks, which a recomputation leaves out (`lora_mlp`)."""
    return sum(block.inner * block.hidden for tower, block in blocks if tower == part)


def _comes_back(rows: Sequence[Load], part: str, way: Way) -> bool:
    """Whether what attention gave comes back from the host instead of being computed again."""
    return part == "vision" and way.fused and way.mode == "offload" and Batch(rows, (), ()).keeps_attention


def _traffic(shapes: Shapes, batch: Batch, way: Way, passes: int) -> float:
    """Return the bytes of activations that pass through memory in a batch.

    What a block saves is written once a pass and read twice: by the layer that it is for, and by that layer's adapter.
    """
    units = batch.tokens(recorded=False)
    numbers = sum(saved(block, shapes.rank, way.fused) * units[tower] for tower, block in flowing(shapes))
    return 3.0 * numbers * way.itemsize * passes


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
