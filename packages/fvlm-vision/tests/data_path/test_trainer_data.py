from __future__ import annotations

import copy
import math

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments

from fvlm_core.errors import ConfigError, DataError
from fvlm_vision.collator import FastVisionDataCollator
from fvlm_vision.labels import train_on_responses_only
from fvlm_vision.rows import NumberedRows
from fvlm_vision.trainer import FastVisionTrainer
from fvlm_vision.training_args import own_copy, sequence_limit


def test_dataloader_workers_give_the_same_batches(lora, processor, rows, arguments, trained):
    losses = [
        trained(
            FastVisionTrainer(
                model=lora(), tokenizer=processor, train_dataset=rows, args=arguments(dataloader_num_workers=workers)
            )
        )
        for workers in (0, 2)
    ]
    assert losses[0] == losses[1]


def test_datasets_and_streams(lora, processor, arguments, picture, caplog, trained):
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


def test_a_collator_of_the_users_own_gets_the_very_samples_of_the_list(lora, processor, rows, arguments, trained):
    model = lora()
    inner, seen = FastVisionDataCollator(model, processor), []

    def collate(samples):
        seen.extend(samples)
        return inner(samples)

    trained(
        FastVisionTrainer(model=model, tokenizer=processor, data_collator=collate, train_dataset=rows, args=arguments())
    )
    assert seen
    assert {id(sample) for sample in seen} <= {id(sample) for sample in rows}


def test_a_corrupt_row_is_named(lora, processor, rows, arguments):
    rows[5]["messages"][0]["content"].insert(0, {"type": "image", "image": b"broken"})
    for workers in (0, 1):
        args = arguments(max_steps=8, dataloader_num_workers=workers)
        trainer = FastVisionTrainer(model=lora(), tokenizer=processor, train_dataset=rows, args=args)
        with pytest.raises(DataError, match="row 5: the image 6 bytes is corrupt"):
            trainer.train()


def test_samples_too_long_do_not_stop_a_run(lora, processor, ask, arguments, trained):
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
    with pytest.raises(ConfigError, match="trainer is a list"):
        train_on_responses_only([])
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


def test_a_model_with_nothing_to_train_is_refused(lora, processor, rows, arguments):
    model = lora()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter: put an adapter on it"):
        FastVisionTrainer(model=model, tokenizer=processor, train_dataset=rows, args=arguments())


@pytest.mark.parametrize("change", [{"packing": True}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_settings_that_cannot_be_are_refused(arguments, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        own_copy(arguments(**change))


def test_rows_carry_their_number():
    numbered = NumberedRows([{"a": 1}, {"a": 2}])
    assert numbered[1].row == 1
    assert numbered[1] == {"a": 2}
    assert copy.deepcopy(numbered[1]).row == 1
