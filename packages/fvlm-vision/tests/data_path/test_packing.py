"""A packed batch trains exactly what the padded batch of the same samples trains."""

from __future__ import annotations

import pickle

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fvlm_core.checkpointing import apply_checkpointing, use_graphs
from fvlm_core.errors import ConfigError
from fvlm_core.fused import fuse_model, unfuse_model
from fvlm_core.graphs import LayerGraphs
from fvlm_core.testing import FAMILIES
from fvlm_core.versions import mixes_up_packed_images
from fvlm_vision import FastVisionTrainer
from fvlm_vision.collator import FastVisionDataCollator

REFUSED = {"mllama": "other samples' images", "paligemma": "other samples"}
if mixes_up_packed_images():
    REFUSED["gemma3"] = "mixes up the images"
PACKED = [family for family in FAMILIES if family not in REFUSED]


@pytest.fixture(scope="module")
def adapted(model_of):
    """A model with the same LoRA on every linear of the towers at every call; B starts at random."""
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
            made[family] = get_peft_model(model_of(family), config).train()
        return made[family]

    return make


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", PACKED)
def test_loss_and_gradients_are_the_padded_batchs(family, adapted, processor_of, ask):
    model, processor = adapted(family), processor_of(family)
    long = "total 7 date " * 4  # longer than Gemma 3's window of 16
    samples = [ask(images=1, answer=long), ask(images=0, seed=5, answer="x"), ask(images=2, seed=9, answer=long)]
    options = {"max_seq_length": 90, "train_on_responses_only": family == "gemma3"}
    padded = FastVisionDataCollator(model, processor, **options)(samples)
    batch = FastVisionDataCollator(model, processor, packing=True, **options)(samples)
    assert batch["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert "attention_mask" not in batch
    expected = loss_and_gradients(model, padded)
    found = loss_and_gradients(model, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert set(found[1]) == set(expected[1])
    assert any("vision" in name or "visual" in name for name in expected[1])
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        assert error < 1e-5, (name, error)
    # The comparison can fail: positions that run on let the samples see each other.
    running = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["position_ids"])
    seeing = {**batch, "position_ids": running}
    assert abs(float(loss_and_gradients(model, seeing)[0] / expected[0]) - 1) > 1e-4


FUSED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "mistral3", "gemma3"]


@pytest.mark.parametrize("family", [family for family in FUSED if family in PACKED])
def test_a_fused_model_attends_by_segments(family, model_of, processor_of, ask):
    """What the padded batch gives the model's own layers, in fp32; recorded layers included."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model, processor = get_peft_model(model_of(family), config).train(), processor_of(family)
    samples = [ask(images=1, answer="total 7 " * 5), ask(images=0, answer="x"), ask(images=2, seed=9)]
    options = {"train_on_responses_only": family == "gemma3"}
    padded = FastVisionDataCollator(model, processor, **options)(samples)
    expected = loss_and_gradients(model, padded)
    fuse_model(model)
    graphs = LayerGraphs(rehearse=True)
    use_graphs(model, graphs)
    apply_checkpointing(model, True)
    batch = FastVisionDataCollator(model, processor, packing=True, **options)(samples)
    if family == "gemma3":  # its image tokens see each other both ways, and its window hides what is far
        assert "packed_starts" not in batch
    else:
        assert batch["packed_starts"].diff().tolist()[:3] == padded["attention_mask"].sum(dim=1).tolist()
        assert batch["input_ids"].shape[1] % 64 == 0
    for _ in range(3):
        found = loss_and_gradients(model, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
        assert set(found[1]) == set(expected[1])
        for name, gradient in expected[1].items():
            error = float((found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
            assert error < 1e-5, (name, error)
    assert graphs.replayed > graphs.recorded > 0
    if family != "gemma3":  # whoever does not know what the row is of must not let its samples see each other
        unfuse_model(model)
        assert loss_and_gradients(model, batch)[0].isnan()


def test_segments_are_left_to_models_that_can(model_of, processor_of, ask):
    model, processor = model_of("pixtral"), processor_of("pixtral")
    fuse_model(model)
    assert "packed_starts" in FastVisionDataCollator(model, processor, packing=True)([ask()])
    for name, value in (("sliding_window", 16), ("attention_dropout", 0.1)):
        before = getattr(model.config.text_config, name)
        setattr(model.config.text_config, name, value)
        assert "packed_starts" not in FastVisionDataCollator(model, processor, packing=True)([ask()])
        setattr(model.config.text_config, name, before)


@pytest.mark.parametrize("family", [family for family in ("qwen2_5_vl", "gemma3") if family in PACKED])
def test_text_only_and_padded_to_a_multiple(family, adapted, processor_of, ask):
    model, processor = adapted(family), processor_of(family)
    samples = [ask(images=0, answer="one two three"), ask(images=0, answer="four")]
    padded = FastVisionDataCollator(model, processor)(samples)
    batch = FastVisionDataCollator(model, processor, packing=True, pad_to_multiple_of=32)(samples)
    assert batch["input_ids"].shape[1] % 32 == 0
    assert {batch[name].shape[-1] for name in ("labels", "position_ids")} == {batch["input_ids"].shape[1]}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**padded).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_would_leak_are_refused(family, shared_model_of, processor_of):
    with pytest.raises(ConfigError, match=REFUSED[family]):
        FastVisionDataCollator(shared_model_of(family), processor_of(family), packing=True)


def test_what_was_never_compared_is_refused(model_of, processor_of):
    model, processor = model_of("qwen2_vl"), processor_of("qwen2_vl")
    model.config.text_config.model_type = "mamba"
    with pytest.raises(ConfigError, match="no test holds"):
        FastVisionDataCollator(model, processor, packing=True)
    model.config.text_config.model_type = "qwen2_vl_text"
    model.config.text_config._attn_implementation = "of_my_own"
    with pytest.raises(ConfigError, match="attn_implementation='of_my_own'"):
        FastVisionDataCollator(model, processor, packing=True)


def test_the_collator_is_still_picklable(shared_model_of, processor_of, ask):
    collator = FastVisionDataCollator(shared_model_of("qwen2_vl"), processor_of("qwen2_vl"), packing=True)
    samples = [ask(), ask(images=2, seed=3)]
    restored = pickle.loads(pickle.dumps(collator))(samples)
    assert torch.equal(restored["position_ids"], collator(samples)["position_ids"])


def test_the_trainer_packs_when_asked_to_pad_nothing(lora, processor, rows, arguments, trained):
    """`padding_free=True` reaches the trainer's own collator; the losses are those of padded training."""
    losses = []
    for free in (False, True):
        args = arguments(SFTConfig, padding_free=free, max_length=None)
        trainer = FastVisionTrainer(model=lora(), args=args, train_dataset=rows, processing_class=processor)
        assert (len(trainer.data_collator([rows[0], rows[1]])["input_ids"]) == 1) == free
        losses.append(trained(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_with_nothing_left_is_packed_too(shared_model_of, processor_of, ask):
    model, processor = shared_model_of("qwen2_vl"), processor_of("qwen2_vl")
    collator = FastVisionDataCollator(model, processor, packing=True, max_seq_length=12).keeping_empty_batches()
    batch = collator([ask(images=3)])
    assert (batch["labels"] == -100).all()
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_stock_trainers_take_packed_batches(kind, lora, processor, rows, arguments, trained):
    losses = []
    for packing in (False, True):
        model = lora()
        stock = kind(
            model=model,
            args=arguments(
                SFTConfig if kind is SFTTrainer else TrainingArguments,
                remove_unused_columns=False,
                **({"dataset_kwargs": {"skip_prepare_dataset": True}} if kind is SFTTrainer else {}),
            ),
            data_collator=FastVisionDataCollator(model, processor, packing=packing),
            train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}) if kind is SFTTrainer else rows,
            processing_class=processor,
        )
        stock.train_dataset = rows
        losses.append(trained(stock))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
