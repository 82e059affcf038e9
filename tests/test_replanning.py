"""``use_gradient_checkpointing="auto"`` where memory runs out outside of layers: the trainer repeats the micro-batch.

Losses, accuracies, gradients' norms and weights are those of a run in which nothing happened, bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from parity_tools import make_batches, trainable
from trl import SFTConfig

from fvlm_core import ResourceError
from fvlm_core.checkpointing import graphs_of, use_graphs
from fvlm_core.graphs import LayerGraphs
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer, repeating

STEPS = 4


class Shortage:
    """Raises in its n-th call from when it is armed on, and in all later ones if it is told so."""

    def __init__(self):
        self.left, self.calls, self.lasting, self.raised = 0, 0, False, 0

    def __call__(self, *_):
        self.calls += 1
        self.left -= 1
        if self.left == 0 or (self.lasting and self.left < 0):
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


def wanting(model, place):
    """A shortage behind the layers in a forward pass, or between the towers in a backward pass."""
    shortage, inner = Shortage(), model.get_base_model().model
    if place == "forward":
        inner.language_model.norm.register_forward_hook(shortage)
    else:
        inner.visual.merger.register_full_backward_hook(shortage)
    return shortage


@pytest.fixture
def trainer_of(qwen2_vl_folder, tmp_path):
    """Makes a trainer of fused and recorded layers, and what lets memory run out in it."""

    def make(place, dropout=0.0, mode="auto", dropped="language_model", **settings):
        model, processor = FastVisionModel.from_pretrained(
            qwen2_vl_folder, load_in_16bit=True, fused_layers=True, device_map="cpu"
        )
        use_graphs(model, LayerGraphs(rehearse=True))
        model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, use_gradient_checkpointing=mode)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for name, module in model.named_modules():
            if dropout and dropped in name and name.endswith("lora_dropout"):
                module["default"] = torch.nn.Dropout(dropout)
        samples = [sample for batch in make_batches(2 * STEPS) for sample in batch]
        given = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "train_sampling_strategy": "sequential",
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = FastVisionTrainer(
            model=model,
            processing_class=processor,
            data_collator=FastVisionDataCollator(model, processor),
            train_dataset=samples,
            eval_dataset=samples[:6],
            args=SFTConfig(**{**given, **settings}),
        )
        return trainer, wanting(model, place)

    return make


def run(trainer):
    trainer.train()
    names = ("loss", "mean_token_accuracy", "grad_norm")
    history = [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]
    return history, {name: p.detach().clone() for name, p in trainable(trainer.model).items()}


def assert_equal_runs(ours, expected):
    assert ours[0] == expected[0]
    assert len({entry["loss"] for entry in expected[0]}) == STEPS
    for name, weight in expected[1].items():
        assert torch.equal(ours[1][name], weight), name


@pytest.mark.parametrize(("dropout", "flat"), [(0.0, "none"), (0.5, "none"), (0.0, "some"), (0.0, "all")])
@pytest.mark.parametrize("micro_batch", [5, 6])  # the first and the second of the third step
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_micro_batch_is_repeated(trainer_of, caplog, monkeypatch, place, micro_batch, dropout, flat):
    monkeypatch.setattr(FastVisionTrainer, "_can_be_flat", lambda self, model: flat != "none")
    monkeypatch.setattr("fvlm_core.flat.LEAST", 1000 if flat == "some" else 0)
    whole, shortage = trainer_of(place, dropout)
    expected = run(whole)
    assert shortage.calls == 2 * STEPS
    if flat != "none":
        assert bool(whole._flat.alone) == (flat == "some")
        assert len(whole._flat.parameters) < len(trainable(whole.model))
    trainer, shortage = trainer_of(place, dropout)
    shortage.left = micro_batch
    assert_equal_runs(run(trainer), expected)
    assert (shortage.raised, shortage.calls) == (1, 2 * STEPS + 1)
    assert len([r for r in caplog.records if "give it back" in r.message]) == 1
    assert graphs_of(trainer.model).holds  # less than before


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_micro_batch_is_repeated_where_layers_keep_without_recordings(trainer_of, caplog, place):
    """Dropout everywhere: no layer is recorded, and all keep what they compute until memory runs out."""
    whole, _ = trainer_of(place, 0.5, dropped="")
    expected = run(whole)
    assert graphs_of(whole.model).recorded == 0
    trainer, shortage = trainer_of(place, 0.5, dropped="")
    shortage.left = 5
    assert_equal_runs(run(trainer), expected)
    assert (shortage.raised, shortage.calls) == (1, 2 * STEPS + 1)
    assert len([r for r in caplog.records if "layers that are not recorded kept up to" in r.message]) == 1


def test_a_shortage_that_stays_is_one_sentence(trainer_of):
    trainer, shortage = trainer_of("forward")
    shortage.left, shortage.lasting = 6, True
    with pytest.raises(
        ResourceError, match=r"^memory of cpu ran out in step 3, over a batch of 2 x \d+ tokens: lower "
    ):
        trainer.train()
    assert 1 < shortage.raised <= 5
    assert not graphs_of(trainer.model).holds


def test_without_anything_to_give_back_nothing_is_repeated(trainer_of):
    trainer, shortage = trainer_of("backward", mode=True)
    shortage.left = 6
    with pytest.raises(ResourceError, match=r"set use_gradient_checkpointing='offload', lower per_device_train_batch"):
        trainer.train()
    assert shortage.calls == 6


def test_a_search_for_the_batch_size_gets_the_error_that_it_waits_for(trainer_of):
    trainer, shortage = trainer_of("forward", mode=True, auto_find_batch_size=True)
    shortage.left = 3
    trainer.train()
    assert trainer.state.train_batch_size == 1


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_large_gradients_are_not_copied(trainer_of, monkeypatch, place):
    """A micro-batch that has not added to them is repeated; one that has, in part, is not."""
    expected = run(trainer_of(place)[0])
    monkeypatch.setattr(repeating, "MOST_COPIED", 0)
    trainer, shortage = trainer_of(place)
    shortage.left = 6
    if place == "forward":
        assert_equal_runs(run(trainer), expected)
        return
    with pytest.raises(ResourceError, match=r"a lower memory_budget in from_pretrained, .* added twice"):
        trainer.train()
    trainer, shortage = trainer_of(place)
    shortage.left = 5  # the first of a step adds to nothing
    assert_equal_runs(run(trainer), expected)


def test_several_processes_cannot_repeat(trainer_of, monkeypatch):
    monkeypatch.setattr(repeating.RepeatingTrainer, "_alone", False)
    trainer, shortage = trainer_of("forward")
    shortage.left = 6
    with pytest.raises(ResourceError, match=r"a lower memory_budget .* processes work in step"):
        trainer.train()
    assert shortage.calls == 6


def test_evaluation_is_repeated(trainer_of):
    whole, _ = trainer_of("forward")
    whole.train()
    expected = whole.evaluate()
    trainer, shortage = trainer_of("forward")
    trainer.train()
    shortage.left = 2
    found = trainer.evaluate()
    assert shortage.raised == 1
    assert not graphs_of(trainer.model).holds
    for name in ("eval_loss", "eval_mean_token_accuracy"):
        assert found[name] == expected[name]
