"""What blocks keep between forward and backward, and need while they run. docs/estimate.md has the formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fvlm_cli.estimate.shapes import Block, Shapes
from fvlm_cli.estimate.workload import Load

Mode = Literal["none", "recompute", "offload", "auto"]
MODES: tuple[Mode, ...] = ("none", "recompute", "offload", "auto")

STAGE = 4  # hidden states in the arena of recordings: input, output, and the gradients of both
IN_FLIGHT = 3  # hidden states outside of recordings: the input, the output, one on its way to the host or back


@dataclass(frozen=True)
class Batch:
    """A batch, and the shapes that batches of a run are recorded in.

    Attributes:
        rows: of the batch; they are padded to the longest.
        lengths: of text that recordings are made of, ascending.
        patches: the same of numbers of patches.
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
        lengths = [max(row.tokens for row in group) for group in batches]
        patches = [sum(row.patches for row in group) for group in batches]
        return cls(rows, recorded_sizes(lengths, _text_step()), recorded_sizes(patches, 1))

    def tokens(self, recorded: bool) -> dict[str, int]:
        """Return the tokens of each tower, padding included; `recorded`: that of recordings too."""
        length, patches = max(row.tokens for row in self.rows), sum(row.patches for row in self.rows)
        if recorded:
            length, patches = _room_for(length, self.lengths), _room_for(patches, self.patches)
        return {"language": len(self.rows) * length, "vision": patches}

    @property
    def keeps_attention(self) -> bool:
        """Whether images are large enough that offloading keeps what their attention gave (`fvlm_core.passes`)."""
        from fvlm_core.passes import KEEP_FROM

        patches = sum(row.patches for row in self.rows)
        return patches > 0 and sum(row.spans for row in self.rows) >= KEEP_FROM * patches


def _text_step() -> int:
    from fvlm_core.graphs.fit import STEP

    return STEP


def recorded_sizes(sizes: Sequence[int], step: int) -> list[int]:
    """Return which sizes recordings are made of, as `fvlm_core.graphs.sightings` decides, in two rounds over the data.

    Args:
        sizes: tokens or patches of batches, in order.
        step: what a recording of just one size is rounded up to.
    """
    from fvlm_core.graphs.fit import in_eighths
    from fvlm_core.graphs.sightings import OFTEN

    made: set[int] = set()
    seen: Counter[int] = Counter()
    for size in (*sizes, *sizes):
        close, wide = -(-size // step) * step, in_eighths(size)
        if size == 0 or close in made:
            continue
        seen.update({close, wide})
        often = 2 * seen[close] > seen[wide]
        if wide in made:
            if often and seen[close] > OFTEN:
                made.add(close)
        elif often and seen[close] > 1:
            made.add(close)
        elif seen[wide] > 1:
            made.add(wide)
    return sorted(made)


def _room_for(size: int, made: Sequence[int]) -> int:
    return next((length for length in made if length >= size), size)


@dataclass(frozen=True)
class Activations:
    """Bytes.

    Attributes:
        kept: from forward to backward, on the device.
        working: tower → what its block that needs most takes while its backward pass runs, hidden states on their way
            included.
        stages: the fixed memory of recordings.
        passing: the language model's hidden states on their way, when the loss is computed.
        between: what the projector keeps while the language model runs.
        joined: what a tower that puts results of several layers side by side holds at its end.
        host: pinned host memory.
    """

    kept: float
    working: dict[str, float]
    stages: float
    passing: float
    between: float
    joined: float
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
    kept = host = passing = 0.0
    working: dict[str, float] = {}
    stage: dict[tuple[str, int], float] = {}
    between = _between(shapes, batch, itemsize) if any(tower == "vision" for tower, _ in blocks) else 0.0
    for tower, block in blocks:
        carried = _carried(shapes, tower, itemsize)
        numbers = saved(block, rank, fused) * itemsize + block.norms * block.hidden * (carried - itemsize)
        hidden = block.hidden * tokens[tower] * carried
        attended = block.query * tokens[tower] * itemsize if recorded and _kept_beside(tower, batch, mode) else 0.0
        for role, size in (("hidden", STAGE * hidden), ("attended", attended)):
            place = (role, carried if role == "hidden" else itemsize)
            stage[place] = max(stage.get(place, 0.0), size)
        flight = (1 if mode in ("none", "recompute") else IN_FLIGHT) * (hidden + attended)
        passing = flight if tower == "language" else passing
        going_back = _going_back(block, fused) * tokens[tower] * itemsize
        need = flight + going_back + (between if tower == "language" else 0.0)
        if mode in ("recompute", "offload"):  # else what is saved counts as kept
            need += numbers * tokens[tower]
        working[tower] = max(working.get(tower, 0.0), need)
        if mode == "none":
            kept += numbers * tokens[tower]
        elif mode == "recompute":
            kept += hidden
        elif mode == "auto":  # each recorded shape keeps for itself, and the output beside
            each = len(batch.rows) * sum(batch.lengths) if tower == "language" else sum(batch.patches)
            kept += (numbers + block.hidden * itemsize) * each
        else:
            host += hidden + attended
    # All recordings take their places from one arena, of the size of the largest of a role and dtype
    # (`fvlm_core.graphs.stage.Arena`).
    stages = sum(stage.values()) if recorded else 0.0
    joined = _joined(shapes, tokens["vision"], itemsize) if fused and between else 0.0
    return Activations(kept, working, stages, passing, between, joined, host)


def _carried(shapes: Shapes, tower: str, itemsize: int) -> int:
    """Return the bytes of a number that goes from block to block: of fp32 where a norm stands in front of them all."""
    return max(itemsize, 4) if shapes.joined and tower == "vision" else itemsize


def _joined(shapes: Shapes, patches: int, itemsize: int) -> float:
    """Return what a tower holds that puts results of several layers side by side (`fvlm_core.fused.tiles`).

    These results, and what the norms in front of the local and the global layers keep; and twice what is put together.
    """
    numbers = shapes.blocks["vision"][0].hidden * patches
    states = (shapes.joined + 2) * numbers * _carried(shapes, "vision", itemsize)
    return float(states + 2 * shapes.joined * numbers * itemsize) if shapes.joined else 0.0


def _kept_beside(tower: str, batch: Batch, mode: Mode) -> bool:
    """Whether the result of attention goes to the host beside a block's input, instead of being computed again.

    Not in the language models: their queries have more heads than their keys, which `fvlm_core.passes` leaves alone.
    """
    return mode == "offload" and tower == "vision" and batch.keeps_attention


def _going_back(block: Block, fused: bool) -> int:
    """Return the numbers a token that the backward pass through a block's MLP, its widest part, holds at once.

    The gradient of the hidden activation, and those of both pre-activations; the gradients of the block's output and
    of the MLP's input. Fused, the gradient of the first pre-activation takes the place of that of the activation, which
    itself is gone before (`fvlm_kernels.lora_mlp`).
    """
    inner = (2 if block.gated else 1) + (0 if fused else 1)
    return inner * block.inner + 2 * block.hidden


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
