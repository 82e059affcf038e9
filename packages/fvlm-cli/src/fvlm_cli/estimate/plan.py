"""A config → what it needs, what fits, and how large a batch may be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.data.row import Row
from fvlm_cli.estimate.activations import MODES, Batch, Mode
from fvlm_cli.estimate.gpus import GPUS, Gpu
from fvlm_cli.estimate.memory import GIB, RESERVE, Held, Memory, Way, memory
from fvlm_cli.estimate.shapes import Shapes, read_shapes
from fvlm_cli.estimate.time import Step, step
from fvlm_cli.estimate.workload import Load
from fvlm_core.errors import CheckpointError

if TYPE_CHECKING:
    from fvlm_cli.inspection.opened import Opened

_CHECKPOINTING: dict[bool | str, Mode] = {
    False: "none",
    True: "recompute",
    "offload": "offload",
    "unsloth": "offload",
    "auto": "auto",
}
SPARE_SHARE, SPARE = 0.1, 1.0 * GIB  # of a card, which "auto" leaves free
_MOST = 4096  # rows of the largest batch that is looked for


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        shapes: of the model with its adapters.
        held: how the base weights are held.
        mode: of gradient checkpointing.
        loads: of the rows that were looked at.
        batch: rows a batch.
        fused: whether the fused layers and loss were counted.
        memory: of one batch of the longest rows.
        config: the run's.
    """

    shapes: Shapes
    held: Held
    mode: Mode
    loads: list[Load]
    batch: int
    fused: bool
    memory: Memory
    config: TrainConfig

    @property
    def longest(self) -> Load:
        """The row with the most of everything, which memory is counted for."""
        return Load(*(max(getattr(load, name) for load in self.loads) for name in Load.__dataclass_fields__))

    @property
    def typical(self) -> Load:
        """The mean row, which time is counted for."""
        means = (statistics.fmean(getattr(load, name) for load in self.loads) for name in Load.__dataclass_fields__)
        return Load(*map(round, means))

    def memory_of(
        self, batch: int, held: Held | None = None, mode: Mode | None = None, load: Load | None = None
    ) -> Memory:
        """Return the memory of another batch, precision, mode or row."""
        train = self.config.train
        rows = Batch.of([load or self.longest] * batch, self.loads if load is None else ())
        accumulation = train.gradient_accumulation_steps
        way = Way(held or self.held, mode or self.mode, train.optim, self.fused, accumulation)
        return memory(self.shapes, rows, way)

    def least(self, batch: int, load: Load | None = None) -> Memory:
        """Return what a batch cannot do without: with `"auto"`, which keeps what there is room for, nothing is kept."""
        return self.memory_of(batch, mode="offload" if self.mode == "auto" else None, load=load)

    def memory_on(self, gpu: Gpu) -> Memory:
        """Return the memory on a card, which decides how much `"auto"` keeps.

        It keeps no more than leaves a tenth of the card and one GiB free, or than the config's budget allows
        (`fvlm_core.graphs.room`).
        """
        if self.mode != "auto":
            return self.memory
        whole, budget = gpu.memory * GIB - RESERVE, self.config.model.memory_budget
        room = whole - SPARE_SHARE * gpu.memory * GIB - SPARE if budget is None else min(budget * GIB, whole)
        over = self.memory.peak - room
        return replace(self.memory, kept=max(0.0, self.memory.kept - max(0.0, over)))

    def fits(self, gpu: Gpu) -> bool:
        """Tell whether the config's batch fits on a card."""
        return self.least(self.batch).needed <= gpu.memory * GIB

    def largest_batch(self, gpu: Gpu) -> int:
        """Return the largest batch that fits on a card, up to 4096; 0 where none does."""
        low, high = 0, _MOST + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.least(middle).needed <= gpu.memory * GIB else (low, middle)
        return low

    def largest_images(self, gpu: Gpu) -> float | None:
        """Return how many times the pixels of the longest row's images fit on a card with the config's batch.

        None where the family gives every image the same tokens, or the row has no image. `model.max_seq_length` may
        set in before.
        """
        if not self.longest.scales or not self.longest.media:
            return None
        low, high = 0.0, float(_MOST)
        while high - low > 0.01:
            middle = (low + high) / 2
            needed = self.least(self.batch, self.longest.scaled(middle)).needed
            low, high = (middle, high) if needed <= gpu.memory * GIB else (low, middle)
        return round(low, 2)

    def modes(self) -> dict[str, dict[Mode, Memory]]:
        """Return the memory of every precision and checkpointing mode that the config could ask for."""
        precisions: list[Held] = ["full"] if self.held == "full" else ["4bit", "8bit", "16bit"]
        return {held: {mode: self.memory_of(self.batch, held, mode) for mode in MODES} for held in precisions}

    def step_on(self, gpu: Gpu) -> Step:
        """Return the time of an optimizer step on a card."""
        train = self.config.train
        mode = self.mode
        if mode == "auto" and self.memory.needed > gpu.memory * GIB:
            mode = "offload"  # some blocks are kept and others are not: counted as if none were
        way = Way(self.held, mode, train.optim, self.fused, train.gradient_accumulation_steps)
        return step(self.shapes, [self.typical] * self.batch, gpu, way)

    def fitting(self) -> dict[str, bool]:
        """Return for every card of the table whether the run fits."""
        return {name: self.fits(gpu) for name, gpu in GPUS.items()}


def shapes_of(config: TrainConfig, opened: Opened) -> tuple[Shapes, Held]:
    """Put the config's adapters, or those that it names, on the model's skeleton; return its sizes, and how it is held.

    Raises:
        ConfigError: the adapters cannot be had on this model.
        CheckpointError: those that it names are damaged.
    """
    held: Held = config.model.precision or ("4bit" if opened.stored is None else opened.stored.value)
    model: Any = opened.skeleton
    model.requires_grad_(held == "full")
    if opened.adapter is not None:
        from peft import LoraConfig, get_peft_model

        try:
            saved: Any = LoraConfig.from_pretrained(opened.named.name, **opened.named.options)
            saved.inference_mode, saved.init_lora_weights = False, True
            model = get_peft_model(model, saved)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"adapter_config.json of {opened.named.name!r} cannot be used ({' '.join(str(error).split())}): save "
                "the adapter again."
            ) from None
    elif held != "full":
        from fvlm_cli.training.build import adapt

        # How adapters start changes no size, and some ways of starting read the weights.
        lora = config.lora.model_copy(update={"init_lora_weights": None})
        model = adapt(model, lora, config.model)
    return read_shapes(model, opened.facts), held


def estimate(config: TrainConfig, opened: Opened, loads: Sequence[Load]) -> Estimate:
    """Return what a run needs.

    Args:
        config: the run's.
        opened: its model; adapters are put on its skeleton.
        loads: what its rows bring.

    Raises:
        ConfigError: the adapters cannot be had on this model.
    """
    shapes, held = shapes_of(config, opened)
    batch = config.train.per_device_train_batch_size
    mode = _CHECKPOINTING[config.model.gradient_checkpointing]
    fused = bool(opened.facts.fused)
    if mode == "auto" and not fused:
        mode = "offload"  # as training does: no layer is recorded
    draft = Estimate(shapes, held, mode, list(loads), batch, fused, Memory(), config)
    return Estimate(shapes, held, mode, list(loads), batch, fused, draft.memory_of(batch), config)


def loads_of(config: TrainConfig, opened: Opened, rows: Sequence[Row]) -> list[Load]:
    """Return what rows of the config's data bring.

    Raises:
        DataError: a row cannot be used.
        ConfigError: all of them are left out.
    """
    from fvlm_cli.estimate.workload import loads_of_rows
    from fvlm_cli.training.collate import build_collator

    collator = build_collator(config.data, opened.skeleton, opened.processor())
    return loads_of_rows(collator, rows, opened.skeleton.config)
