"""PaliGemma: samples without an image, beside others and alone, as its model takes them."""

from __future__ import annotations

import pickle

import pytest
import torch

from fvlm_vision import FastVisionTrainer
from fvlm_vision.collator import FastVisionDataCollator


@pytest.fixture
def processor(processor_of):
    return processor_of("paligemma")


@pytest.fixture
def model(shared_model_of):
    """In training mode, which its mask depends on; there is no dropout."""
    model = shared_model_of("paligemma").train()
    yield model
    model.eval()


def written_out(processor, question, answer):
    """The inputs of a text-only sample from the parts that the model's authors name, by the tokenizer alone."""
    parts = [f"<bos>{question}\n", f"{answer}<eos>", "\n"]
    prefix, answer, end = (processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    ids = torch.tensor([prefix + answer + end])
    types = torch.tensor([[0] * len(prefix) + [1] * (len(answer) + len(end))])
    labels = torch.tensor([[-100] * len(prefix) + answer + [-100] * len(end)])
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids), "labels": labels}


def with_image(processor, sample):
    """The inputs of a sample with images by the stock processor, which tells the answer by its `suffix`."""
    user, assistant = sample["messages"]
    images = [block["image"] for block in user["content"] if "image" in block]
    text = "<image>" * len(images) + user["content"][-1]["text"]
    return dict(processor(images=[images], text=[text], suffix=[assistant["content"]], return_tensors="pt"))


def test_paligemma_learns_nothing_that_it_has_seen(shared_model_of, processor_of, model_of, ask, picture):
    """Its prefix sees both ways: changing a learned token must not change what is predicted before it."""
    processor, model = processor_of("paligemma"), model_of("paligemma").eval()
    collator = FastVisionDataCollator(shared_model_of("paligemma"), processor, train_on_responses_only=True)
    batch = collator([ask(answer="total 5 date 7")])
    first = int((batch["labels"][0] != -100).nonzero()[0])
    model.train()  # the mask of training
    with torch.no_grad():
        before = model(**batch).logits[0, :first]
        batch["input_ids"][0, first + 1] += 1
        after = model(**batch).logits[0, :first]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def step(model, batches):
    """The mean loss over all learned tokens of the batches, and its gradients."""
    model.zero_grad()
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    loss = sum(model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("counts", [(0, 2, 1), (1, 0), (2, 0, 0), (0, 0), (0,)], ids=str)
def test_every_sample_of_a_batch_is_what_stock_has_alone(model, processor, ask, counts):
    samples = [ask(images=n, seed=n, answer="total 5 " * (1 + n), question="Read " * (n + 1)) for n in counts]
    batch = FastVisionDataCollator(model, processor, train_on_responses_only=True)(samples)
    alone = [
        with_image(processor, one) if n else written_out(processor, one["messages"][0]["content"][0]["text"], answer)
        for one, n in zip(samples, counts, strict=True)
        for answer in [one["messages"][1]["content"]]
    ]
    with torch.no_grad():
        logits = model(**batch).logits
    for row, expected in enumerate(alone):
        length = expected["input_ids"].shape[1]
        for name in ("input_ids", "token_type_ids", "labels", "attention_mask"):
            assert torch.equal(batch[name][row, :length], expected[name][0]), name
        assert (batch["labels"][row, length:] == -100).all()
        with torch.no_grad():
            torch.testing.assert_close(logits[row, :length], model(**expected).logits[0], rtol=1e-5, atol=1e-5)
    pixels = [one["pixel_values"] for one in alone if "pixel_values" in one]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels)) if pixels else "pixel_values" not in batch
    (loss, gradients), (expected, others) = step(model, [batch]), step(model, alone)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert set(gradients) == set(others) != set()
    for name, gradient in others.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_what_is_learned_without_a_template_is_stocks_suffix(model, processor, ask, picture):
    """The checkpoints of the model's authors have no chat template: prompts and completions."""
    expected = with_image(processor, ask(answer="invoice 42"))
    processor.chat_template = processor.tokenizer.chat_template = None
    collator = pickle.loads(pickle.dumps(FastVisionDataCollator(model, processor)))
    alone = {"prompt": "Read this.", "completion": "invoice 42"}
    batch = collator([{**alone, "prompt": "<image>Read this.", "images": [picture()]}, alone])
    text_only = written_out(processor, "Read this.", "invoice 42")
    for row, one in enumerate((expected, text_only)):
        length = one["input_ids"].shape[1]
        for name in ("input_ids", "token_type_ids", "labels"):
            assert torch.equal(batch[name][row, :length], one[name][0]), name
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize("overflow", ["truncate", "skip"])
def test_text_is_left_where_an_image_is_over_the_limit(model, processor, ask, overflow):
    text, wide = ask(images=0, answer="date"), ask(images=2)
    collator = FastVisionDataCollator(model, processor, max_seq_length=20, overflow=overflow)
    batch, alone = collator([wide, text]), FastVisionDataCollator(model, processor)([text])
    assert collator.overflow_counts.skipped == 1
    assert set(batch) == set(alone)
    assert all(torch.equal(batch[name], value) for name, value in alone.items())


def test_a_run_goes_on_where_all_images_of_a_batch_are_over_the_limit(model_of, processor, ask, arguments, trained):
    rows = [ask(images=0, answer="date"), ask(images=2)] * 4
    trainer = FastVisionTrainer(
        model=model_of("paligemma"),
        args=arguments(max_length=20, train_sampling_strategy="sequential"),
        train_dataset=rows,
        processing_class=processor,
    )
    losses = trained(trainer)
    assert len(losses) == 3
    assert losses[2] < losses[0]
