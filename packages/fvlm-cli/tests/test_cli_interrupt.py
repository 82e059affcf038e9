"""Ctrl-C among several processes, which agree after each step whether to stop."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from fvlm_cli.output import Output
from fvlm_cli.training.interrupt import Interruption


def test_a_signal_that_comes_while_the_processes_agree_counts_after_the_next_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    interruption = Interruption(Output(quiet=True))
    monkeypatch.setattr("torch.distributed.new_group", lambda **given: "a group")
    during: list[int] = [signal.SIGINT]

    def talk(tensor: Any, *given: Any, **named: Any) -> None:
        if during:
            signal.raise_signal(during.pop())  # behind what this process has said of itself

    monkeypatch.setattr("torch.distributed.all_reduce", talk)
    args, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState()
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    control = TrainerControl()
    with interruption:
        interruption.on_train_begin(args, state, control)
        assert not interruption.on_step_end(args, state, control).should_training_stop
        assert interruption.on_step_end(args, state, control).should_training_stop
    assert control.should_save
