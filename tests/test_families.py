"""Every family in every precision: what FVLM loads, trains, generates and saves is what plain libraries do."""

from __future__ import annotations

import pytest
import torch
from matrix_tools import LOADING, assert_same, curve, gradients, ours, plain, same_start, sample, stock
from parity_tools import trainable
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

from fvlm_core.arch import facts_for, tower_of
from fvlm_core.checkpointing import apply_checkpointing
from fvlm_core.testing import FAMILIES, tiny_checkpoint
from fvlm_vision import FastVisionDataCollator, FastVisionModel

STEPS = 32


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A family's tiny checkpoint in fp32."""
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture(scope="module", params=LOADING)
def pair(request, folder):
    """Both models with the same adapter, in training, the processor and the precision."""
    model, processor = ours(folder, request.param)
    other = stock(folder, request.param, model)
    same_start((model, other))
    return model, other.train(), processor, request.param


def batch_for(model, processor, **options):
    return FastVisionDataCollator(model, processor, **options)([sample(1, images=2), sample(5, answer="one stamp")])


def test_logits_equal_stocks_with_the_same_quantization(pair):
    model, other, processor, _ = pair
    batch = batch_for(model, processor)
    with torch.no_grad(), model.disable_adapter(), other.disable_adapter():
        assert torch.equal(model(**batch).logits, other(**plain(batch, processor)).logits)


def test_loss_and_gradients_equal_stocks_in_every_checkpointing_mode(pair):
    model, other, processor, _ = pair
    batch = batch_for(model, processor)
    expected = gradients(other, plain(batch, processor))
    assert set(expected[1]) == set(trainable(other))
    for mode in (False, True, "offload"):
        apply_checkpointing(model, mode)
        assert_same(gradients(model, batch), expected)


def test_generation_equals_stocks_and_training_goes_on_as_before(pair, capsys):
    model, other, processor, _ = pair
    batch = batch_for(model, processor)
    before = gradients(model, batch)
    FastVisionModel.for_inference(model)
    other.eval()
    one = prompt(processor, [sample(1)])
    two = prompt(processor, [sample(1), sample(5, answer="")], padding_side="left")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    for inputs, options, told in (
        (one, {"do_sample": False}, {"streamer": streamer}),
        (two, {"do_sample": False}, {}),
        (two, {"do_sample": True, "temperature": 0.7}, {}),
    ):
        answers = []
        for asked, more in ((model, told), (other, {})):
            torch.manual_seed(0)
            answers.append(asked.generate(**inputs, max_new_tokens=4, **options, **more))
        assert torch.equal(*answers)
        if told:
            written = processor.tokenizer.decode(answers[0][0, inputs["input_ids"].shape[1] :])
            assert written
            assert written in capsys.readouterr().out
    other.train()
    FastVisionModel.for_training(model)
    after = gradients(model, batch)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in before[1].items())


def prompt(processor, samples, **options):
    texts = [
        processor.apply_chat_template(one["messages"][:1], tokenize=False, add_generation_prompt=True)
        for one in samples
    ]
    texts[-1:] = [texts[-1].replace("what is 5", "what is it now")]  # of another length
    images = [[block["image"] for block in one["messages"][0]["content"] if "image" in block] for one in samples]
    bos = processor.tokenizer.bos_token
    if bos is not None and texts[0].startswith(bos):
        options["add_special_tokens"] = False
    encoded = processor(text=texts, images=images, return_tensors="pt", padding=True, **options)
    return {name: value for name, value in encoded.items() if name != "labels"}


def test_the_adapter_reloads_by_plain_peft(pair, folder, tmp_path):
    from peft import PeftModel

    model, _, processor, precision = pair
    model.save_pretrained(tmp_path)
    base = stock(folder, precision, model).unload()
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    batch = batch_for(model, processor)
    assert_same(gradients(again, plain(batch, processor)), gradients(model, batch), tolerance=1e-6)


@pytest.mark.parametrize("precision", ["4bit", "16bit"])
@pytest.mark.parametrize("tower", ["vision", "language"])
def test_a_frozen_tower_leaves_the_other_ones_gradients(folder, tower, precision):
    model, processor = ours(folder, precision, **{f"finetune_{tower}_layers": False})
    facts = facts_for(model)
    assert all(tower_of(name, facts) not in (tower, None) for name in model.base_model.targeted_module_names)
    other = stock(folder, precision, model).train()
    same_start((model, other))
    batch = batch_for(model, processor)
    assert_same(gradients(model, batch), gradients(other, plain(batch, processor)))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "modules_to_save": ["lm_head"]}], ids=str)
def test_variants_of_lora_equal_stocks(folder, options):
    model, processor = ours(folder, "16bit", finetune_last_n_layers=1, **options)
    other = stock(folder, "16bit", model).train()
    same_start((model, other))
    batch = batch_for(model, processor)
    assert_same(gradients(model, batch), gradients(other, plain(batch, processor)))


def test_full_finetuning_equals_stocks(folder):
    model, processor = FastVisionModel.from_pretrained(folder, full_finetuning=True)
    other = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    FastVisionModel.for_training(model)
    batch = batch_for(model, processor)
    expected = gradients(other, plain(batch, processor))
    for mode in (False, True, "offload"):
        apply_checkpointing(model, mode)
        assert_same(gradients(model, batch), expected)


def both_to_train(folder, precision):
    """FVLM's model and stock's with the same start, everything trained where ``precision`` is "full"."""
    if precision == "full":
        model, processor = FastVisionModel.from_pretrained(folder, full_finetuning=True)
        FastVisionModel.for_training(model)
        return model, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train(), processor
    model, processor = ours(folder, precision)
    other = stock(folder, precision, model).train()
    same_start((model, other))
    return model, other, processor


@pytest.mark.parametrize("precision", [*LOADING, "full"])
def test_a_curve_of_32_steps_is_stocks(folder, precision):
    model, other, processor = both_to_train(folder, precision)
    collator = FastVisionDataCollator(model, processor)
    batches = [collator([sample(number % 4, answer="one stamp " * (1 + number % 3))]) for number in range(STEPS)]
    curves = [curve(model, batches), curve(other, [plain(batch, processor) for batch in batches])]
    assert curves[1][-1] < curves[1][0] - 0.1  # it learns: two flat curves would agree too
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_the_processor_is_the_checkpoints(folder):
    _, processor = FastVisionModel.from_pretrained(folder, load_in_16bit=True)
    assert type(processor) is type(AutoProcessor.from_pretrained(folder))
