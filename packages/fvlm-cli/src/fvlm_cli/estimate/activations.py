"""What blocks keep between forward and backward, and need while they run. docs/estimate.md has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fvlm_cli.estimate.shapes import Block, Shapes
from fvlm_cli.estimate.workload import Load

Mode = Literal["none", "recompute", "offload", "auto"]
MODES: tuple[Mode, ...] = ("none", "recompute", "offload", "auto")

ROUND_TO = 64  # recorded text lengths are multiples of it (fvlm_core.graphs)
MOST_SHAPES = 16  # recorded shapes that are kept
STAGE = 4  # hidden states that recordings hold: input, output, and the gradients of both
IN_FLIGHT = 3  # hidden states outside of recordings: the input, the output, one on its way to the host or back


@dataclass(frozen=True)
class Batch:
    """A batch, and the shapes that batches of a run come in.

    Attributes:
        rows: of the batch; they are padded to the longest.
        lengths: distinct lengths that batches are padded to.
        patches: distinct numbers of patches that batches have.
    """

    rows: Sequence[Load]
    lengths: Sequence[int]
    patches: Sequence[int]

    @classmethod
    def of(cls, rows: Sequence[Load], seen: Sequence[Load] = ()) -> Batch:
        """Return a batch of these rows; `seen` are rows of the run in order, which shapes are taken from."""
        size = len(rows)
        groups = [seen[start : start + size] for start in range(0, len(seen), size)]
        batches = [group for group in groups if len(group) == size] or [rows]
        lengths = {_rounded(max(row.tokens for row in group)) for group in batches}
        patches = {sum(row.patches for row in group) for group in batches}
        return cls(rows, sorted(lengths)[-MOST_SHAPES:], sorted(patches)[-MOST_SHAPES:])

    def tokens(self, recorded: bool) -> dict[str, int]:
        """Return the tokens of each tower, padding included."""
        length = max(row.tokens for row in self.rows)
        length = _rounded(length) if recorded else length
        return {"language": len(self.rows) * length, "vision": sum(row.patches for row in self.rows)}


def _rounded(length: int) -> int:
    return -(-length // ROUND_TO) * ROUND_TO


@dataclass(frozen=True)
class Activations:
    """Bytes.

    Attributes:
        kept: from forward to backward, on the device.
        working: of the block that needs most while its backward pass runs.
        stages: the fixed memory of recordings.
        passing: hidden states between blocks.
        between: what the projector keeps while the language model runs.
        host: pinned host memory.
    """

    kept: float
    working: float
    stages: float
    passing: float
    between: float
    host: float


def saved(block: Block, rank: int, fused: bool) -> int:
    """Return the numbers that one block saves for backward, a token."""
    norms = (block.norms + 2) * block.hidden  # their inputs, and the inputs of attention and MLP that two of them make
    attention = 2 * block.query + block.values
    if block.head_norms:
        attention += block.query + block.values // 2
    if block.joint:
        attention += 2 * block.query  # rotated copies of queries and keys beside the joint product
    inner = 2 if block.gated else 1
    if not fused:
        inner += 2 if block.gated else 1
    return norms + attention + inner * block.inner + rank * block.ranks


def activations(shapes: Shapes, batch: Batch, mode: Mode, *, fused: bool, rank: int, itemsize: int) -> Activations:
    """Return what a step's blocks need.

    Only blocks through which a gradient flows count: those from the first trained one on. Fused blocks under gradient
    checkpointing run as recordings.
    """
    recorded = fused and mode != "none"
    tokens = batch.tokens(recorded)
    blocks = flowing(shapes)
    kept = working = host = widest = 0.0
    between = _between(shapes, batch, itemsize) if any(tower == "vision" for tower, _ in blocks) else 0.0
    for tower, block in blocks:
        numbers = saved(block, rank, fused) * itemsize
        passing = block.hidden * tokens[tower] * itemsize
        widest = max(widest, passing)
        going_back = ((3 if block.gated else 2) * block.inner + 2 * block.hidden) * tokens[tower] * itemsize
        beside = between if tower == "language" else 0.0
        if mode == "none":
            kept += numbers * tokens[tower]
            working = max(working, going_back + beside)
            continue
        working = max(working, numbers * tokens[tower] + going_back + beside)
        if mode == "recompute":
            kept += passing
        elif mode == "auto" and fused:  # each recorded shape keeps for itself, and the output beside
            each = len(batch.rows) * sum(batch.lengths) if tower == "language" else sum(batch.patches)
            kept += (numbers + block.hidden * itemsize) * each
        else:
            host += passing
    stages = STAGE * widest if recorded else 0.0
    flight = 1 if mode in ("none", "recompute") else IN_FLIGHT
    return Activations(kept, working, stages, flight * widest, between, host)


def _between(shapes: Shapes, batch: Batch, itemsize: int) -> float:
    """Return what the projector saves: the inputs and outputs of its linear layers."""
    return float(shapes.between * sum(row.media for row in batch.rows) * itemsize)


def flowing(shapes: Shapes) -> list[tuple[str, Block]]:
    """Return the blocks that keep something for backward, with their towers, in the order in which they run."""
    ordered = [(tower, block) for tower in ("vision", "language") for block in shapes.blocks.get(tower, [])]
    if not any(block.ranks for _, block in ordered):
        whole = {tower for tower in ("vision", "language") if shapes.trainable.get(tower, 0)}
        return ordered if "vision" in whole else [item for item in ordered if item[0] == "language"]
    first = next(place for place, (_, block) in enumerate(ordered) if block.ranks)
    if shapes.trainable.get("projector", 0) or shapes.trainable.get("embedding", 0):
        first = min(first, sum(tower == "vision" for tower, _ in ordered))
    return ordered[first:]
