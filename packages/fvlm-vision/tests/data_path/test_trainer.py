from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from fvlm_core.checkpointing import checkpointing_mode
from fvlm_core.origin import Origin, set_origin
from fvlm_core.precision import Precision
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.cpu_config import restore_defaults
from fvlm_vision.trainer import FastVisionTrainer


def test_same_losses_as_the_stock_trainer_step_by_step(lora, processor, rows, arguments, trained):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": False}
    ours = FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=arguments(**settings))
    model = lora()
    stock = Trainer(
        model=model,
        args=arguments(TrainingArguments, remove_unused_columns=False, **settings),
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=rows,
    )
    our_losses, stock_losses = trained(ours), trained(stock)
    assert len(our_losses) == 4
    assert len(set(our_losses)) == 4
    assert our_losses == stock_losses
    for (name, mine), (_, theirs) in zip(ours.model.named_parameters(), stock.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_first_loss_is_that_of_the_plain_model(lora, processor, rows, arguments, trained):
    trainer = FastVisionTrainer(
        model=lora(),
        tokenizer=processor,
        train_dataset=rows,
        args=arguments(max_steps=1, per_device_train_batch_size=8),
    )
    batch = FastVisionDataCollator(trainer.model, processor)(rows)
    model = lora()
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert trained(trainer)[0] == pytest.approx(float(expected), rel=1e-5)


def test_accumulating_four_times_two_equals_eight(lora, processor, rows, arguments, trained):
    """Samples differ in length, so a mean of means would not do."""
    results = []
    for size, steps in ((8, 1), (2, 4)):
        args = arguments(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3)
        trainer = FastVisionTrainer(model=lora(), processing_class=processor, train_dataset=rows, args=args)
        losses = trained(trainer)
        results.append((losses, [p.detach() for p in trainer.model.parameters() if p.requires_grad]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for whole, parts in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=2e-5)  # Adam's first steps divide by small gradients


def test_the_four_programs_arguments_on_a_list(lora, processor, rows, arguments):
    model = lora()
    args = arguments(
        gradient_accumulation_steps=4,
        max_steps=1,
        remove_unused_columns=False,
        dataset_text_field="",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = FastVisionTrainer(
        model=model,
        tokenizer=processor,
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=rows,
        args=args,
    )
    assert trainer.train().training_loss > 0


def test_default_settings_of_sft_config_train_in_the_models_precision(lora, processor, rows, arguments, caplog):
    restore_defaults()  # a model that another test loaded has changed them
    args = SFTConfig(output_dir=arguments().output_dir, use_cpu=True, max_steps=1, save_strategy="no")
    before = copy.deepcopy(args.to_dict())
    with caplog.at_level(logging.INFO, logger="fvlm_vision"):
        trainer = FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=args)
    assert trainer.accelerator.mixed_precision == "no"
    assert not trainer.args.bf16
    assert "bf16=False" in caplog.text
    trainer.train()
    assert args.to_dict() == before  # the user's own settings are as they were
    assert args.bf16


def test_checkpointing_of_an_fvlm_model_stands(lora, processor, rows, arguments):
    model = lora()
    trainer = FastVisionTrainer(model=model, tokenizer=processor, train_dataset=rows, args=arguments())
    assert trainer.args.gradient_checkpointing  # a plain model: as the settings say
    set_origin(model.get_base_model(), Origin("x", None, Precision.HALF, False, "float32", False))
    trainer = FastVisionTrainer(model=model, tokenizer=processor, train_dataset=rows, args=arguments(max_steps=1))
    trainer.train()
    assert checkpointing_mode(model) is False


def test_the_models_forward_is_its_own(lora, processor, rows, arguments):
    model = lora()
    FastVisionTrainer(model=model, tokenizer=processor, train_dataset=rows, args=arguments())
    base = model.get_base_model()
    assert "forward" not in vars(base)
    assert base.forward.__func__ is type(base).forward


def test_adapters_of_quantized_models_keep_their_precision(lora, processor, rows, arguments):
    model = lora()
    model.get_base_model().is_loaded_in_4bit = True  # what trl goes by
    FastVisionTrainer(model=model, tokenizer=processor, train_dataset=rows, args=arguments())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_peft_config_is_applied(model_of, processor, rows, arguments):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = FastVisionTrainer(
        model=model_of("qwen2_vl"),
        tokenizer=processor,
        train_dataset=rows,
        peft_config=config,
        args=arguments(max_steps=1),
    )
    trainer.train()
    changed = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    assert len(changed) == 2  # q_proj of both layers


def test_evaluation(lora, processor, rows, arguments):
    trainer = FastVisionTrainer(
        model=lora(), tokenizer=processor, train_dataset=rows, eval_dataset=rows[:4], args=arguments(max_steps=1)
    )
    batch = trainer.data_collator(rows[:4])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    labels = batch["labels"][:, 1:]
    right = (expected.logits[:, :-1].argmax(-1) == labels)[labels != -100]
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(float(right.double().mean()))
    assert trainer.evaluate(rows[4:])["eval_loss"] != metrics["eval_loss"]
    many = FastVisionTrainer(
        model=lora(),
        tokenizer=processor,
        train_dataset=rows,
        eval_dataset={"a": rows[:2], "b": rows[2:4]},
        args=arguments(),
    )
    assert {"eval_a_loss", "eval_b_loss"} <= set(many.evaluate())


def test_resuming_gives_the_uninterrupted_losses(lora, processor, rows, arguments, tmp_path, trained):
    def run(folder, **changes):
        args = arguments(output_dir=str(tmp_path / folder), max_steps=6, save_strategy="steps", save_steps=3, **changes)
        return FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=args)

    whole = trained(run("whole"))
    resumed = run("again")
    assert len(whole) == 6
    assert trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")) == whole[3:]
