"""A training run's progress on stderr: a bar with the time left on a terminal, else a line for each report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fvlm_cli.bars import clock_time, progress_bar
from fvlm_cli.output import Output

_SHOWN = ("loss", "learning_rate", "eval_loss")


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, learning rate, how long a step takes, and the time left."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bar = progress_bar(out)
        self._task: Any = None
        self._start = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start the bar."""
        self._start, self._first_step = time.monotonic(), state.global_step
        self._bar.start()
        done = state.global_step
        self._task = self._bar.add_task("training", total=state.max_steps, completed=done, begun=done, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Advance the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """Show the loss."""
        shown = " ".join(f"{name} {logs[name]:.4g}" for name in _SHOWN if logs and name in logs)
        if not shown:
            return
        self._bar.update(self._task, note=shown)
        if not self._out.interactive:
            self._out.note(f"step {state.global_step}/{state.max_steps} {shown}{self._pace(state)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Stop the bar."""
        self.stop()

    def stop(self) -> None:
        """Stop the bar, also where training broke off."""
        self._bar.stop()

    def _pace(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if done < 1:
            return ""
        seconds = (time.monotonic() - self._start) / done
        return f", {seconds:.2f} s a step, {clock_time(seconds * (state.max_steps - state.global_step))} left"
