"""What a run's history holds beside what the trainer logs: the time and the memory of each report."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Figures(TrainerCallback):
    """Adds to each report of the loss `seconds_per_step` since the last one, and the peak of memory so far.

    Memory is `device_memory_gib`, what PyTorch's allocator had at most, or without a GPU `host_memory_gib`, what the
    process had.
    """

    def __init__(self) -> None:
        self._at = 0.0
        self._step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start the clock."""
        self._at, self._step = time.monotonic(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Add to the report that was just made."""
        entry: dict[str, Any] = state.log_history[-1]
        if "loss" not in entry or state.global_step <= self._step:
            return
        now = time.monotonic()
        entry["seconds_per_step"] = round((now - self._at) / (state.global_step - self._step), 6)
        entry |= _memory()
        self._at, self._step = now, state.global_step

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Leave the time of an evaluation out of the next step's."""
        self._at, self._step = time.monotonic(), state.global_step


def _memory() -> dict[str, float]:
    import torch

    if torch.cuda.is_available():
        return {"device_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 4)}
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {"host_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 4)}
