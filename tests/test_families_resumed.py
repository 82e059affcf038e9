"""A resumed run of every family goes on as the uninterrupted one: losses, weights and the optimizer's state."""

from __future__ import annotations

import pytest
import torch
from matrix_tools import ours, sample
from parity_tools import trainable
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import SFTConfig

from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_vision import FastVisionModel, FastVisionTrainer

STEPS, STOP = 5, 3
ROWS = [sample(number, images=1 + number % 2, answer="one stamp " * (1 + number % 3)) for number in range(8)]


class Losses(TrainerCallback):
    """The unrounded loss of every step."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [logs["loss"]] if "loss" in logs else []


def trainer_of(folder, output_dir, precision, **changes):
    """The trainer of a fresh process: a model from its checkpoint, a new adapter."""
    if precision == "full":
        model, processor = FastVisionModel.from_pretrained(folder, full_finetuning=True)
    else:
        model, processor = ours(folder, precision)
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STOP,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return FastVisionTrainer(
        model=model,
        tokenizer=processor,
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        args=SFTConfig(**{**settings, **changes}),
    )


def run(trainer, **options):
    """Losses, trained weights and the optimizer's moments after a run."""
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train(**options)
    weights = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
    return losses.seen, weights, trainer.optimizer.state_dict()["state"]


def assert_resumes(folder, tmp_path, precision):
    losses, weights, moments = run(trainer_of(folder, tmp_path, precision))
    start = trainer_of(folder, tmp_path / "again", precision)
    before = {name: p.detach().clone() for name, p in trainable(start.model).items()}
    again, found, state = run(start, resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert again == losses[STOP:]
    assert len(losses) == STEPS
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert any(not torch.equal(before[name], weight) for name, weight in weights.items())
    assert {number: int(one["step"]) for number, one in state.items()} == dict.fromkeys(moments, STEPS)
    for number, one in moments.items():
        assert all(torch.equal(state[number][name], value) for name, value in one.items() if name != "step")


@pytest.mark.parametrize("precision", ["4bit", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_goes_on_as_the_whole_one(family, precision, tmp_path):
    assert_resumes(tiny_checkpoint(family, tmp_path / family), tmp_path / "run", precision)


@pytest.mark.parametrize("precision", ["8bit", "16bit"])
@pytest.mark.parametrize("family", ["mllama", "gemma3"])
def test_in_other_precisions_too(family, precision, tmp_path):
    assert_resumes(tiny_checkpoint(family, tmp_path / family), tmp_path / "run", precision)


def test_the_best_weights_of_a_full_finetuning_are_back_at_its_end(tmp_path):
    folder = tiny_checkpoint("mllama", tmp_path / "mllama")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(folder, tmp_path / "run", "full", save_steps=1, learning_rate=1.0, **best)
    trainer.train()
    assert trainer.state.best_global_step == 1  # it diverges
    stored = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "checkpoint-1", dtype=torch.float32)
    for (name, found), expected in zip(trainer.model.state_dict().items(), stored.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
