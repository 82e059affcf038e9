from __future__ import annotations

import copy
import logging
import math

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig

from fvlm_core.errors import ConfigError, DataError
from fvlm_core.origin import Origin, set_origin
from fvlm_core.precision import Precision
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.labels import train_on_responses_only
from fvlm_vision.rows import NumberedRows
from fvlm_vision.trainer import FastVisionTrainer
from fvlm_vision.training_args import own_copy, sequence_limit


class StepLosses(TrainerCallback):
    """The unrounded loss of every logged step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture
def lora(model_of):
    """A tiny Qwen2-VL with the same LoRA at every call, on vision and language."""

    def make():
        model = model_of("qwen2_vl")
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "qkv", "fc1", "down_proj"])
        return get_peft_model(model, config)

    return make


@pytest.fixture
def processor(processor_of):
    return processor_of("qwen2_vl")


@pytest.fixture
def rows(ask):
    return [ask(images=n % 3, seed=n, answer=f"total {n} " * (1 + n % 4)) for n in range(8)]


@pytest.fixture
def arguments(tmp_path):
    """Settings of a short run on the CPU."""

    def make(kind=SFTConfig, **changes):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "max_steps": 3,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return kind(**{**settings, **changes})

    return make


def trained(trainer) -> list[float]:
    losses = StepLosses()
    trainer.add_callback(losses)
    trainer.train()
    return losses.losses


def test_same_losses_as_the_stock_trainer_step_by_step(lora, processor, rows, arguments):
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


def test_first_loss_is_that_of_the_plain_model(lora, processor, rows, arguments):
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


def test_accumulating_four_times_two_equals_eight(lora, processor, rows, arguments):
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
    assert not model.get_base_model().is_gradient_checkpointing


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


def test_resuming_gives_the_uninterrupted_losses(lora, processor, rows, arguments, tmp_path):
    def run(folder, **changes):
        args = arguments(output_dir=str(tmp_path / folder), max_steps=6, save_strategy="steps", save_steps=3, **changes)
        return FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=args)

    whole = trained(run("whole"))
    resumed = run("again")
    losses = StepLosses()
    resumed.add_callback(losses)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(whole) == 6
    assert losses.losses == whole[3:]


def test_dataloader_workers_give_the_same_batches(lora, processor, rows, arguments):
    losses = [
        trained(
            FastVisionTrainer(
                model=lora(), tokenizer=processor, train_dataset=rows, args=arguments(dataloader_num_workers=workers)
            )
        )
        for workers in (0, 2)
    ]
    assert losses[0] == losses[1]


def test_datasets_and_streams(lora, processor, arguments, picture, caplog):
    columns = {
        "messages": [
            [{"role": "user", "content": "Read."}, {"role": "assistant", "content": f"page {n}"}] for n in range(4)
        ],
        "images": [[picture(60, 60, n)] for n in range(4)],
    }
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    listed = [table[n] for n in range(4)]
    results = []
    for data in (listed, table):
        trainer = FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=data, args=arguments())
        results.append(trained(trainer))
    assert results[0] == results[1]
    assert isinstance(trainer.train_dataset[0]["images"][0], dict)  # still encoded: the collator decodes it
    stream = table.to_iterable_dataset()
    assert (
        len(trained(FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=stream, args=arguments()))) == 3
    )


def test_a_corrupt_row_is_named(lora, processor, rows, arguments):
    rows[5]["messages"][0]["content"].insert(0, {"type": "image", "image": b"broken"})
    for workers in (0, 1):
        args = arguments(max_steps=8, dataloader_num_workers=workers)
        trainer = FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=args)
        with pytest.raises(DataError, match="row 5: the image 6 bytes is corrupt"):
            trainer.train()


def test_samples_too_long_do_not_stop_a_run(lora, processor, ask, arguments):
    model = lora()
    collator = FastVisionDataCollator(model, processor, max_seq_length=60, overflow="skip")
    rows = [ask(answer="word " * 90), ask(images=0)]
    args = arguments(per_device_train_batch_size=1, per_device_eval_batch_size=1, max_steps=4)
    trainer = FastVisionTrainer(
        model=model, tokenizer=processor, data_collator=collator, train_dataset=rows, eval_dataset=rows, args=args
    )
    losses = trained(trainer)
    assert sorted(losses)[:2] == [0.0, 0.0]  # two of four steps had no sample left
    assert all(math.isfinite(loss) for loss in losses)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    only = FastVisionTrainer(
        model=model, tokenizer=processor, data_collator=collator, train_dataset=rows, eval_dataset=rows[1:], args=args
    )
    # What was left out counts for nothing: not as a loss of 0, nor as a sample.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(only.evaluate()["eval_loss"])
    empty = [trainer.data_collator(rows[:1])]
    assert int(trainer._get_num_items_in_batch(empty, torch.device("cpu"))) == 1  # a sum over nothing, divided by 1


def test_train_on_responses_only(lora, processor, rows, arguments):
    trainer = FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=arguments(max_steps=1))
    whole = trainer.data_collator(rows)["labels"]
    passed = trainer.data_collator
    assert train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n") is trainer
    replies = trainer.data_collator(rows)["labels"]
    assert 0 < (replies != -100).sum() < (whole != -100).sum()
    assert trainer.data_collator is not passed
    assert torch.equal(passed(rows)["labels"], whole)
    trainer.train()
    with pytest.raises(DataError, match="'### Say' opens no response"):
        train_on_responses_only(trainer, "### Ask", "### Say")
    other = Trainer(model=lora(), args=arguments(TrainingArguments), train_dataset=rows, data_collator=lambda rows: {})
    with pytest.raises(ConfigError, match="FastVisionDataCollator"):
        train_on_responses_only(other)


def test_assistant_only_loss_and_max_length_reach_the_default_collator(lora, processor, rows, arguments):
    model = lora()
    args = arguments(assistant_only_loss=True, max_length=48)
    trainer = FastVisionTrainer(model=model, tokenizer=processor, train_dataset=rows, args=args)
    expected = FastVisionDataCollator(model, processor, max_seq_length=48, train_on_responses_only=True)
    assert torch.equal(trainer.data_collator(rows)["labels"], expected(rows)["labels"])
    model.max_seq_length = 40
    assert sequence_limit(args, model) == 40
    assert sequence_limit(arguments(), model) == 40
    model.max_seq_length = 4096
    assert sequence_limit(arguments(), model) == 4096  # SFTConfig's default of 1024 is no choice


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": iter([])}, "train_dataset is a list_iterator"),
        ({"eval_dataset": {"a": []}}, "eval_dataset['a'] is empty"),
        ({"model": "some/model"}, "model='some/model'"),
        ({"tokenizer": None}, "no processor"),
        ({"processing_class": object()}, "two names"),
        ({"data_collator": len, "formatting_func": len}, "formatting_func"),
    ],
)
def test_bad_arguments_get_one_sentence(lora, processor, rows, arguments, change, part):
    given = {"model": lora(), "tokenizer": processor, "train_dataset": rows, "args": arguments(), **change}
    with pytest.raises(ConfigError) as caught:
        FastVisionTrainer(**given)
    assert part in str(caught.value)


@pytest.mark.parametrize("change", [{"packing": True}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_settings_that_cannot_be_are_refused(arguments, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        own_copy(arguments(**change))


def test_rows_carry_their_number():
    numbered = NumberedRows([{"a": 1}, {"a": 2}])
    assert numbered[1].row == 1
    assert numbered[1] == {"a": 2}
    assert copy.deepcopy(numbered[1]).row == 1
