"""FVLM trains as plain transformers + PEFT + bitsandbytes do: the same losses, the same gradients, the same curve."""

from __future__ import annotations

import pytest
import torch
from parity_tools import BATCHES, clones, flat_gradients, make_batches, stock_model, trainable
from transformers import AutoProcessor

from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

LEARNING_RATE = 1e-3


@pytest.fixture(scope="module", params=["16bit", "4bit"])
def pair(request, qwen2_vl_folder):
    """The same adapter on the same base, loaded by stock code and by FVLM."""
    model, processor = FastVisionModel.from_pretrained(
        qwen2_vl_folder, load_in_4bit=request.param == "4bit", load_in_16bit=request.param == "16bit"
    )
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8)
    stock = stock_model(qwen2_vl_folder, four_bit=request.param == "4bit", targets=model.fvlm_targets.modules)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    generator = torch.Generator().manual_seed(1)
    for name in start:  # B begins at zero, which would leave A's gradients zero on the first step
        start[name] = torch.randn(start[name].shape, generator=generator) * 0.05
    return model, stock, processor, start, request.param


def restore(model, start):
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(start[name])


def test_the_first_three_steps_have_the_same_loss_and_gradients(pair):
    model, stock, processor, start, _ = pair
    assert set(trainable(model)) == set(trainable(stock))
    restore(model, start)
    restore(stock, start)
    collator = FastVisionDataCollator(model, processor)
    optimizers = [torch.optim.AdamW(trainable(m).values(), lr=LEARNING_RATE, foreach=False) for m in (model, stock)]
    model.train()
    stock.train()
    for samples in make_batches(3):
        batch = collator(samples)
        plain = {name: value for name, value in clones(batch).items() if name in processor.model_input_names}
        plain["labels"] = batch["labels"].clone()
        losses = [model(**batch).loss, stock(**plain).loss]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        for loss in losses:
            loss.backward()
        ours, theirs = flat_gradients(model), flat_gradients(stock)
        for name, expected in theirs.items():
            assert expected.abs().max() > 0, name
            error = (ours[name] - expected).norm() / expected.norm()
            assert error < 1e-5, (name, float(error))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_thirty_two_steps_of_the_trainer_follow_the_plain_loop(pair, tmp_path):
    from trl import SFTConfig

    model, stock, processor, start, precision = pair
    restore(model, start)
    restore(stock, start)
    batches = make_batches(BATCHES)
    trainer = FastVisionTrainer(
        model=model,
        tokenizer=processor,
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=[sample for batch in batches for sample in batch],
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=BATCHES,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            optim="adamw_torch",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    ours = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    optimizer = torch.optim.AdamW(trainable(stock).values(), lr=LEARNING_RATE, weight_decay=0.0)
    collator = FastVisionDataCollator(model, processor)
    stock.train()
    theirs = []
    for samples in batches:
        batch = collator(samples)
        plain = {name: value for name, value in batch.items() if name in processor.model_input_names}
        loss = stock(**plain, labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(stock).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert len(ours) == len(theirs) == BATCHES
    assert theirs[-1] < theirs[0] - 0.1  # it learns: two flat curves would agree too
    limit = 1e-4 if precision == "16bit" else 1e-3
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < limit


def test_the_collator_gives_what_the_processor_gives(pair):
    """The comparison above uses one batch for both sides; here is that the batch is stock too."""
    model, processor, folder = pair[0], pair[2], pair[0].config.name_or_path
    samples = make_batches(1)[0]
    batch = FastVisionDataCollator(model, processor)(samples)
    stock = AutoProcessor.from_pretrained(folder)
    texts = [stock.apply_chat_template(sample["messages"], tokenize=False) for sample in samples]
    images = [
        [block["image"] for block in sample["messages"][0]["content"] if block["type"] == "image"] for sample in samples
    ]
    expected = stock(text=texts, images=images, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
