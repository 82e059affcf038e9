"""Fused and recorded layers under the collator, the trainers and PEFT: stock's losses, gradients and weights."""

from __future__ import annotations

import pytest
import torch
from parity_tools import clones, flat_gradients, make_batches, stock_model, trainable
from transformers import Trainer, TrainerCallback, TrainingArguments

from fvlm_core.checkpointing import graphs_of, use_graphs
from fvlm_core.fused import fuse_model
from fvlm_core.graphs import LayerGraphs
from fvlm_core.testing import tiny_checkpoint
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

STEPS = 32


@pytest.fixture(scope="module", params=["16bit", "4bit"])
def pair(request, qwen2_vl_folder):
    """The same adapter on the same base: stock, and FVLM's with fused layers that are recorded."""
    four_bit = request.param == "4bit"
    model, processor = FastVisionModel.from_pretrained(
        qwen2_vl_folder, load_in_4bit=four_bit, load_in_16bit=not four_bit, fused_layers=True, device_map="cpu"
    )
    use_graphs(model, LayerGraphs(rehearse=True))
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8)
    stock = stock_model(qwen2_vl_folder, four_bit=four_bit, targets=model.fvlm_targets.modules)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    generator = torch.Generator().manual_seed(1)
    for name in start:
        start[name] = torch.randn(start[name].shape, generator=generator) * 0.05
    return model, stock, processor, start


def restore(model, start):
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(start[name])


def plain(processor, samples, model):
    """A batch as stock takes it."""
    batch = FastVisionDataCollator(model, processor, plan_loss=False)(samples)
    kept = {name: value for name, value in clones(batch).items() if name in processor.model_input_names}
    return {**kept, "labels": batch["labels"].clone()}


def test_three_batches_three_times(pair):
    model, stock, processor, start = pair
    restore(model, start)
    restore(stock, start)
    model.train()
    stock.train()
    collator = FastVisionDataCollator(model, processor)
    batches = make_batches(3)
    assert {"label_rows", "media_rows"} <= set(collator(batches[0]))
    assert "attention_mask" not in collator(batches[0])
    for samples in batches * 3:
        stock.zero_grad()
        expected = stock(**plain(processor, samples, stock)).loss
        expected.backward()
        model.zero_grad()
        loss = model(**collator(samples)).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        theirs = flat_gradients(stock)
        for name, gradient in flat_gradients(model).items():
            error = (gradient - theirs[name]).norm() / theirs[name].norm()
            assert error < 1e-5, (name, float(error))
    assert graphs_of(model).replayed > graphs_of(model).recorded > 0


def curve(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", [FastVisionTrainer, Trainer])
def test_a_run_of_the_trainer_follows_the_plain_loop(pair, tmp_path, kind):
    model, stock, processor, start = pair
    restore(model, start)
    restore(stock, start)
    batches = make_batches(STEPS)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
    )
    options = {"processing_class": processor}
    trainer = kind(
        model=model,
        args=args,
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=[sample for batch in batches for sample in batch],
        **options,
    )
    losses = curve(trainer)
    assert len(losses) == STEPS
    optimizer = torch.optim.AdamW(trainable(stock).values(), lr=1e-3, weight_decay=0.0)
    optimizer.zero_grad()  # what an earlier test left
    stock.train()
    for samples, ours in zip(batches, losses, strict=True):
        expected = stock(**plain(processor, samples, stock)).loss
        expected.backward()
        torch.nn.utils.clip_grad_norm_(trainable(stock).values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert ours == pytest.approx(expected.item(), abs=1e-4)


def test_evaluation_and_generation_after_training(pair):
    model, stock, processor, start = pair
    restore(model, start)
    restore(stock, start)
    FastVisionModel.for_inference(model)
    stock.eval()
    inputs = plain(processor, make_batches(1)[0][:1], stock)
    del inputs["labels"]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=1e-4, atol=1e-5)
        tokens = [m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (model, stock)]
    assert torch.equal(*tokens)
    FastVisionModel.for_training(model)


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mode", ["offload", "auto"])
def test_a_step_does_not_wait_for_the_device(qwen2_vl_folder, mode, packing):
    model, processor = FastVisionModel.from_pretrained(qwen2_vl_folder, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model, r=4, use_gradient_checkpointing=mode)
    batch = FastVisionDataCollator(model, processor, packing=packing)(make_batches(1)[0])
    assert ("packed_starts" in batch) == packing
    batch = {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    count = torch.tensor(20, device=model.device)
    for turn in range(4):
        if turn == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                model(**batch, num_items_in_batch=count).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert graphs_of(model).replayed > graphs_of(model).recorded > 0


class Strict(TrainerCallback):
    """Makes it an error to wait for the device, once layers are recorded: within steps, or from one into the next."""

    def __init__(self, across):
        self.across, self.steps = across, 0

    def on_step_begin(self, args, state, control, **_):
        if state.global_step >= 4:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **_):
        self.steps += torch.cuda.get_sync_debug_mode() == 2
        if not self.across or state.global_step == args.max_steps:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch_fused"])
def test_a_trainers_steps_do_not_wait_for_the_device(qwen2_vl_folder, tmp_path, optim, across):
    model, processor = FastVisionModel.from_pretrained(qwen2_vl_folder, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model, r=16)
    strict = Strict(across)
    trainer = FastVisionTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=7,
            logging_steps=100,
            optim=optim,
            bf16=True,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=make_batches(1)[0] * 16,
        processing_class=processor,
        callbacks=[strict],
    )
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.steps == 3
    assert graphs_of(model).replayed > graphs_of(model).recorded > 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "pixtral", "mistral3"])
def test_segments_on_a_gpu_give_what_the_padded_batch_gives(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / family)
    model, processor = FastVisionModel.from_pretrained(str(folder), load_in_16bit=True)
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, init_lora_weights=False)
    steps = []
    for packing in (False, True):
        batch = FastVisionDataCollator(model, processor, packing=packing)(make_batches(1)[0])
        batch = {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        for _ in range(3):  # recorded at the second time
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
        steps.append((loss.item(), flat_gradients(model)))
    (expected, gradients), (found, ours) = steps
    assert found == pytest.approx(expected, rel=5e-3)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 0.1 * gradient.norm(), name  # two roundings of bfloat16


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama", "pixtral", "mistral3"])
def test_a_batch_without_its_mask_gives_what_the_masked_one_gives_unfused(family, text_only, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / family)
    model, processor = FastVisionModel.from_pretrained(str(folder), load_in_16bit=True, device_map="cpu")
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, init_lora_weights=False)
    samples = make_batches(1)[0]
    samples[1]["messages"][1]["content"] += " of more words"  # so that the other one is padded in every family
    if text_only:
        for sample in samples:
            del sample["messages"][0]["content"][:-1]

    def step():
        batch = FastVisionDataCollator(model, processor)(samples)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return batch, loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    batch, expected, gradients = step()
    assert (batch["attention_mask"] == 0).any()
    fuse_model(model)
    use_graphs(model, LayerGraphs(rehearse=True))
    for _ in range(3):
        batch, loss, ours = step()
        assert "attention_mask" not in batch
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert set(ours) == set(gradients)
        for name, gradient in gradients.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
