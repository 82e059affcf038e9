"""What of a step would ask the device for a number is done without: losses that are none, and moving batches."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.trainer import FastVisionTrainer
from fvlm_vision.training_args import align, own_copy

BAD = {1: float("nan"), 2: float("inf"), 5: float("nan"), 10: float("-inf")}
"""Micro-batch → what its loss is; its gradients are as they are."""


def spoiled(kind):
    """A trainer of a kind some of whose losses are no numbers."""

    class Spoiled(kind):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            number, self.calls = self.calls, self.calls + 1
            return loss + BAD.get(number, 0.0)

    return Spoiled


@pytest.mark.parametrize("filters", [True, False])
def test_losses_that_are_no_numbers_are_reported_as_stock_reports_them(
    lora, processor, rows, arguments, trained, filters
):
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 2, "logging_nan_inf_filter": filters}
    ours = spoiled(FastVisionTrainer)(model=lora(), tokenizer=processor, train_dataset=rows, args=arguments(**settings))
    model = lora()
    stock = spoiled(Trainer)(
        model=model,
        args=arguments(TrainingArguments, remove_unused_columns=False, gradient_checkpointing=False, **settings),
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=rows,
    )
    mine, theirs = trained(ours), trained(stock)
    assert len(mine) == 3
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), equal_nan=True, rtol=1e-6, atol=0)
    assert all(loss == loss for loss in mine) is filters
    assert ours.args.logging_nan_inf_filter is filters  # as it was


def test_no_micro_batch_asks_whether_its_loss_is_a_number(lora, processor, rows, arguments, trained, monkeypatch):
    asked = []
    own = torch.Tensor.__bool__

    def noting(tensor):
        asked.append(sys._getframe(1).f_code.co_filename)
        return own(tensor)

    monkeypatch.setattr(torch.Tensor, "__bool__", noting)
    args = arguments(max_steps=2, gradient_accumulation_steps=2)
    trained(FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=args))
    assert not [file for file in asked if file.endswith("transformers/trainer.py")]


def test_batches_are_moved_without_waiting_where_there_is_a_device(lora, arguments):
    model = lora()
    for device, pinned, moves in (
        ("cuda", True, True),
        ("cuda", False, False),
        ("mps", True, False),
        ("cpu", True, False),
    ):
        given = arguments()
        args = own_copy(given)
        args.dataloader_pin_memory = pinned  # a setting for the CPU has it off
        vars(args)["_setup_devices"] = torch.device(device)
        align(args, model)
        assert isinstance(args.accelerator_config, AcceleratorConfig)
        assert args.accelerator_config.non_blocking is moves
        assert given.accelerator_config.non_blocking is False  # the user's own
