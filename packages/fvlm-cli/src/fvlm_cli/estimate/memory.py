"""Bytes on the device, part by part. docs/estimate.md has the formulas, their sources, and what they were held against.

Two ways of computing are told apart. `fused`: what FVLM runs on a GPU for a family with written facts; an MLP saves its
input and its pre-activations, a norm its input, the loss a chunk of logits, checkpointed blocks are recordings, and
adapters lie in one flat parameter a tower. `stock`: plain transformers and PEFT; an MLP also saves the activated gate
and the product, and the loss the logits of every token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from fvlm_cli.estimate.activations import Batch, Mode, activations
from fvlm_cli.estimate.shapes import Shapes

Held = Literal["4bit", "8bit", "16bit", "full"]

GIB = 2**30

# NF4 with double quantization (Dettmers et al., "QLoRA", 2023, section 3): 4 bits a weight; an 8-bit scale for 64
# weights; a 32-bit scale for 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
LOGITS_CHUNK = 2**28  # fvlm_kernels.linear_cross_entropy's buffer
WORKSPACES = 4 * 2**25  # cuBLAS: 32 MiB for each of two threads (forward, backward) on each of two streams
RESERVE = 0.8 * GIB  # the CUDA context and what the allocator cannot use

# States of each parameter. In 8 bit (Dettmers et al., 2022) one takes a byte, and 256 of them a 32-bit scale.
_EIGHT_BIT = 1 + 4 / 256
_STATES = {"adamw": 2, "adam": 2, "lamb": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 1}
_FLAT = ("adamw", "adam", "sgd")  # optimizers that work on flat parameters (fvlm_vision.flat_optimizer)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device.

    Attributes:
        weights: of the base model.
        adapters: of what is trained beside it.
        copies: of the adapters in the dtype of computation, which recordings read.
        gradients: of what is trained.
        optimizer: its states.
        inputs: pixels and token ids of a step's batches.
        stages: the fixed memory of recordings.
        workspaces: of cuBLAS.
        kept: activations kept from forward to backward.
        working: of the block that needs most beside what is kept: its recomputation and backward, dequantized weights,
            hidden states on their way.
        language: the same of the language model's blocks alone.
        logits: the same for the loss; of this and those around it the largest counts.
        gathered: the gradients once more, in flat parameters, for the optimizer's step.
        joined: the same for a tower that puts results of several layers side by side, at its end.
        host: pinned host memory, beside the device's.
        recorded: whether `working` is the memory of recordings, which nothing else can use.
    """

    weights: float = 0.0
    adapters: float = 0.0
    copies: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    inputs: float = 0.0
    stages: float = 0.0
    workspaces: float = 0.0
    kept: float = 0.0
    working: float = 0.0
    language: float = 0.0
    logits: float = 0.0
    gathered: float = 0.0
    joined: float = 0.0
    host: float = 0.0
    recorded: bool = False

    @property
    def _standing(self) -> float:
        state = self.weights + self.adapters + self.copies + self.gradients + self.optimizer
        return state + self.inputs + self.stages + self.workspaces + self.kept

    @property
    def peak(self) -> float:
        """What PyTorch's allocator reports as its maximum."""
        return self._standing + max(self.working, self._outside)

    @property
    def _outside(self) -> float:
        """What the most takes of what is never recorded."""
        return max(self.logits, self.gathered, self.joined)

    @property
    def settled(self) -> float:
        """The same once nothing new is recorded.

        What recordings work in is theirs by then: reserved, in the allocator's words, and no longer allocated.
        """
        return self._standing + self._outside if self.recorded else self.peak

    @property
    def settling(self) -> float:
        """The same while texts of new lengths are still recorded."""
        return max(self.settled, self._standing + self.language)

    @property
    def needed(self) -> float:
        """What a card must have."""
        both = self.working + self._outside if self.recorded else max(self.working, self._outside)
        return self._standing + both + RESERVE

    def as_data(self) -> dict[str, float]:
        """Return the parts in GiB."""
        found = {
            name: round(value / GIB, 3) for name, value in asdict(self).items() if name not in ("recorded", "language")
        }
        return {**found, "peak": round(self.peak / GIB, 3), "needed": round(self.needed / GIB, 3)}


@dataclass(frozen=True)
class Way:
    """How a run holds and trains a model.

    Attributes:
        held: how the base weights are held.
        mode: of gradient checkpointing.
        optim: as in transformers.
        fused: whether FVLM's fused layers and loss run.
        accumulation: batches a step, all of which are on the device.
        itemsize: bytes of an activation and of an unquantized weight.
    """

    held: Held
    mode: Mode
    optim: str
    fused: bool
    accumulation: int = 1
    itemsize: int = 2


def memory(shapes: Shapes, batch: Batch, way: Way) -> Memory:
    """Return what a step needs.

    Args:
        shapes: of the model with its adapters.
        batch: one of the step's batches.
        way: how the model is held and trained.
    """
    itemsize, held, fused = way.itemsize, way.held, way.fused
    recorded = fused and way.mode != "none"
    found = activations(shapes, batch, way.mode, fused=fused, rank=shapes.rank, itemsize=itemsize)
    trained_bytes = itemsize if held == "full" else 4  # adapters are fp32, whatever the base is in
    adapters = 0.0 if held == "full" else shapes.trained * 4.0
    flat = fused and held != "full" and way.optim.lower().startswith(_FLAT)
    gradients = float(shapes.trained * trained_bytes)
    gathered = gradients if flat else 0.0
    # Where layers keep what they compute, a batch may have to be done again, with the gradients so far as they were.
    holds = way.mode == "auto" and way.accumulation > 1
    dequantized = float(shapes.largest * itemsize) if held in ("4bit", "8bit") else 0.0
    return Memory(
        weights=weights(shapes, held, itemsize),
        adapters=adapters,
        copies=shapes.trained * float(itemsize) if recorded and held != "full" else 0.0,
        gradients=gradients + (gathered if holds else 0.0),
        optimizer=optimizer(shapes, way.optim, trained_bytes),
        inputs=_inputs(batch, way),
        stages=found.stages,
        workspaces=float(WORKSPACES),
        kept=found.kept,
        working=max(found.working.values(), default=0.0) + dequantized,
        language=found.working.get("language", 0.0) + dequantized,
        logits=logits(shapes, batch, fused=fused, itemsize=itemsize) + found.between + found.passing,
        gathered=0.0 if holds else gathered,
        joined=found.joined,
        host=found.host,
        recorded=recorded,
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


def _inputs(batch: Batch, way: Way) -> float:
    """Return the bytes of a step's batches: pixels as bytes (fused) or fp32, those in use as fp32, four id tensors."""
    pixels = sum(row.pixels for row in batch.rows)
    ids = batch.tokens(recorded=False)["language"] * 8.0 * 4
    waiting = way.accumulation * (pixels * (1.0 if way.fused else 4.0) + ids)
    return waiting + (pixels * 4.0 if way.fused else 0.0)


def logits(shapes: Shapes, batch: Batch, *, fused: bool, itemsize: int) -> float:
    """Return the bytes that the head and the loss need."""
    tokens = batch.tokens(recorded=False)["language"]
    learned = sum(row.learned for row in batch.rows)
    if fused:
        rows = min(LOGITS_CHUNK, learned * shapes.vocabulary * itemsize)
        return rows + 2 * learned * shapes.width * itemsize
    # The logits, an fp32 copy, its gradient, and the gradient in the model's dtype.
    return tokens * shapes.vocabulary * (2.0 * itemsize + 8 if itemsize < 4 else 3.0 * itemsize)
