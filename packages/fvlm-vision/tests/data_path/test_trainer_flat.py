"""Training over flat parameters gives what training over single ones gives."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from fvlm_vision.flat_optimizer import FlatOptimizer
from fvlm_vision.trainer import FastVisionTrainer


def result(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def flat(monkeypatch):
    """Flat parameters on the CPU too; returns a switch."""

    def switch(on):
        monkeypatch.setattr(FastVisionTrainer, "_can_be_flat", lambda self, model: on)

    return switch


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd"])
def test_the_same_weights(lora, processor, rows, arguments, trained, flat, optim):
    results = []
    for on in (True, False):
        flat(on)
        args = arguments(max_steps=5, optim=optim, weight_decay=0.1, learning_rate=1e-2, max_grad_norm=0.5)
        trainer = FastVisionTrainer(model=lora(r=64), tokenizer=processor, train_dataset=rows, args=args)
        losses = trained(trainer)
        assert (trainer._flat is not None) is on
        if on:
            assert len(trainer._flat.parameters) < len(result(trainer)) / 2
        results.append((losses, result(trainer)))
    (losses, weights), (stock_losses, stock_weights) = results
    torch.testing.assert_close(losses, stock_losses, rtol=1e-5, atol=0)
    for name, expected in stock_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6)


def test_no_flat_gradient_lies_beside_the_parameters_own(lora, processor, rows, arguments, trained, flat):
    flat(True)
    held = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **rest):
            held.append([p.grad is not None for p in trainer._flat.parameters])

        def on_step_end(self, args, state, control, **rest):
            held.append([p.grad is not None for p in trainer._flat.parameters if len(trainer._flat.behind(p)) > 1])

    trainer = FastVisionTrainer(
        model=lora(r=64),
        tokenizer=processor,
        train_dataset=rows,
        args=arguments(max_steps=2, max_grad_norm=0.5),
        callbacks=[Watch()],
    )
    trained(trainer)
    assert [any(there) for there in held] == [True, False] * 2


def test_an_optimizer_of_another_kind_gets_the_parameters_themselves(lora, processor, rows, arguments, trained, flat):
    flat(True)
    trainer = FastVisionTrainer(
        model=lora(), tokenizer=processor, train_dataset=rows, args=arguments(max_steps=1, optim="adafactor")
    )
    trained(trainer)
    assert trainer._flat is None
    assert not FlatOptimizer.suits(torch.optim.AdamW, {"params": []})


def test_the_users_own_optimizer_is_used(lora, processor, rows, arguments, trained, flat):
    flat(True)
    model = lora()
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    trainer = FastVisionTrainer(
        model=model,
        tokenizer=processor,
        train_dataset=rows,
        args=arguments(max_steps=1),
        optimizers=(own, None),
    )
    trained(trainer)
    assert trainer._flat is None
    assert own.state


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(lora, processor, rows, arguments, trained, flat, tmp_path):
    flat(True)

    def trainer(**options):
        args = arguments(
            output_dir=str(tmp_path / "out"), max_steps=6, save_steps=3, save_strategy="steps", learning_rate=1e-2,
            optim="adamw_8bit", **options,
        )  # fmt: skip
        return FastVisionTrainer(model=lora(r=64), tokenizer=processor, train_dataset=rows, args=args)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    for name, expected in result(whole).items():
        assert torch.equal(result(resumed)[name], expected), name


def test_what_lies_behind_a_flat_parameter(lora, processor, rows, arguments, trained, flat):
    flat(True)
    trainer = FastVisionTrainer(model=lora(r=64), tokenizer=processor, train_dataset=rows, args=arguments(max_steps=1))
    trained(trainer)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = [[names[id(p)] for p in trainer.behind(own)] for own in trainer._flat.parameters]
    assert sorted(name for group in found for name in group) == sorted(result(trainer))
    assert all(len({"visual" in name for name in group}) == 1 for group in found)
