"""Ctrl-C (or SIGTERM) lets the current step end, saves a checkpoint and stops; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fvlm_cli.output import Output

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """A trainer callback and a context: within it the signals are held back until a step has ended."""

    def __init__(self, out: Output) -> None:
        self.requested = False
        self._out = out
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._out.note("stopping after this step, with a checkpoint; once more stops at once")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Let several processes talk about it beside their devices, which nobody then has to wait for."""
        if args.world_size > 1:
            from torch.distributed import new_group

            self._group = new_group(backend="gloo")

    def _agreed(self) -> bool:
        """Tell whether any process was asked to stop: a signal reaches one a step before another."""
        if self._group is None:
            return self.requested
        import torch
        from torch.distributed import ReduceOp, all_reduce

        asked = torch.tensor(int(self.requested))
        all_reduce(asked, ReduceOp.MAX, group=self._group)
        return bool(asked)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end; several processes ask after the same step."""
        if self._agreed():
            self.requested = True  # never the other way: a signal may have come while the processes talked
            control.should_save = True
            control.should_training_stop = True
        return control
