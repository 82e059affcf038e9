"""Bytes on the device, part by part. docs/estimate.md has the formulas, their sources, and what they were held against.

Two ways of computing are told apart. `fused`: what FVLM runs on a GPU for a family with written facts; an MLP saves its
input and its pre-activations, a norm its input, the loss a chunk of logits. `stock`: plain transformers and PEFT; an
MLP also saves the activated gate and the product, and the loss the logits of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from fvlm_cli.estimate.shapes import Block, Shapes
from fvlm_cli.estimate.workload import Load

Mode = Literal["none", "recompute", "offload"]
MODES: tuple[Mode, ...] = ("none", "recompute", "offload")
Held = Literal["4bit", "8bit", "16bit", "full"]

GIB = 2**30

# NF4 with double quantization (Dettmers et al., "QLoRA", 2023, section 3): 4 bits a weight; an 8-bit scale for 64
# weights; a 32-bit scale for 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
LOGITS_CHUNK = 2**28  # fvlm_kernels.linear_cross_entropy's buffer
RESERVE = 0.8 * GIB  # the CUDA context, cuBLAS workspaces and what the allocator cannot use

# States of each parameter. In 8 bit (Dettmers et al., 2022) one takes a byte, and 256 of them a 32-bit scale.
_EIGHT_BIT = 1 + 4 / 256
_STATES = {"adamw": 2, "adam": 2, "lamb": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        weights: of the base model.
        adapters: of what is trained beside it.
        gradients: of what is trained.
        optimizer: its states.
        inputs: pixels and token ids of a batch.
        kept: activations kept from forward to backward.
        working: of the part of the step that needs most beside what is kept: a block's recomputation and backward.
        logits: the same for the loss; the larger of the two counts.
        buffers: dequantized weights.
        host: pinned host memory, beside the device's.
    """

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    inputs: float
    kept: float
    working: float
    logits: float
    buffers: float
    host: float = 0.0

    @property
    def peak(self) -> float:
        """What PyTorch's allocator reports as its maximum."""
        static = self.weights + self.adapters + self.gradients + self.optimizer
        return static + self.inputs + self.kept + max(self.working, self.logits) + self.buffers

    @property
    def needed(self) -> float:
        """What a card must have."""
        return self.peak + RESERVE

    def as_data(self) -> dict[str, float]:
        """Return the parts in GiB."""
        found = {name: round(value / GIB, 3) for name, value in asdict(self).items()}
        return {**found, "peak": round(self.peak / GIB, 3), "needed": round(self.needed / GIB, 3)}


def memory(
    shapes: Shapes,
    rows: Sequence[Load],
    *,
    held: Held,
    mode: Mode,
    optim: str,
    fused: bool,
    rank: int,
    itemsize: int = 2,
) -> Memory:
    """Return what a step of one batch needs.

    Args:
        shapes: of the model with its adapters.
        rows: of the batch; they are padded to the longest.
        held: how the base weights are held.
        mode: of gradient checkpointing.
        optim: as in transformers.
        fused: whether FVLM's fused layers and loss run.
        rank: of the adapters.
        itemsize: bytes of an activation and of an unquantized weight.
    """
    tokens = {"language": len(rows) * max(row.tokens for row in rows), "vision": sum(row.patches for row in rows)}
    learned = sum(row.learned for row in rows)
    static = weights(shapes, held, itemsize)
    trained_bytes = itemsize if held == "full" else 4  # adapters are fp32, whatever the base is in
    kept, working, host = activations(shapes, tokens, mode, fused=fused, rank=rank, itemsize=itemsize)
    quantized = held in ("4bit", "8bit")
    return Memory(
        weights=static,
        adapters=0.0 if held == "full" else shapes.trained * 4.0,
        gradients=float(shapes.trained * trained_bytes),
        optimizer=optimizer(shapes, optim, trained_bytes),
        inputs=sum(row.pixels for row in rows) * 4.0 + tokens["language"] * 8.0 * 4,
        kept=kept,
        working=working,
        logits=logits(shapes, tokens["language"], learned, fused=fused, itemsize=itemsize),
        buffers=shapes.largest * itemsize if quantized else 0.0,
        host=host,
    )


def weights(shapes: Shapes, held: Held, itemsize: int) -> float:
    """Return the bytes of the base weights."""
    rest = shapes.total - shapes.quantizable
    if held == "4bit":
        return shapes.quantizable * NF4_BYTES + rest * itemsize
    if held == "8bit":
        return shapes.quantizable + shapes.rows * 4 + rest * itemsize
    return float(shapes.total * itemsize)


def optimizer(shapes: Shapes, optim: str, itemsize: int) -> float:
    """Return the bytes of the optimizer's states; of one that is not known, those of Adam."""
    name = optim.lower().removeprefix("paged_")
    if name.startswith("adafactor"):
        return shapes.trained * itemsize * 0.01  # a row and a column of each matrix
    states = next((count for key, count in _STATES.items() if name.startswith(key)), 2)
    if "8bit" in name:
        return states * ((shapes.trained - shapes.small) * _EIGHT_BIT + shapes.small * 4)
    return float(states * shapes.trained * itemsize)


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


def activations(
    shapes: Shapes, tokens: dict[str, int], mode: Mode, *, fused: bool, rank: int, itemsize: int
) -> tuple[float, float, float]:
    """Return (kept, working, host) bytes of activations.

    Only blocks through which a gradient flows count: those from the first trained one on.
    """
    kept = working = host = 0.0
    for tower, block in flowing(shapes):
        inside = saved(block, rank, fused) * tokens[tower] * itemsize
        passing = block.hidden * tokens[tower] * itemsize
        going_back = ((3 if block.gated else 2) * block.inner + 2 * block.hidden) * tokens[tower] * itemsize
        if mode == "none":
            kept += inside
            working = max(working, going_back)
            continue
        working = max(working, inside + going_back)
        if mode == "recompute":
            kept += passing
        else:
            host += passing
            working = max(working, inside + going_back + passing)  # the next input is on its way back
    return kept, working, host


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


def logits(shapes: Shapes, tokens: int, learned: int, *, fused: bool, itemsize: int) -> float:
    """Return the bytes that the head and the loss need."""
    if fused:
        rows = min(LOGITS_CHUNK, learned * shapes.vocabulary * itemsize)
        return rows + 2 * learned * shapes.width * itemsize
    # The logits, an fp32 copy, its gradient, and the gradient in the model's dtype.
    return tokens * shapes.vocabulary * (2.0 * itemsize + 8 if itemsize < 4 else 3.0 * itemsize)
