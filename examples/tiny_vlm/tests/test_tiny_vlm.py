"""The recipe's parts, and a run of it that is far too short to learn to read."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _recipe_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        from architecture import write_untrained

        return write_untrained(tmp_path_factory.mktemp("tiny") / "untrained", seed=0)


def test_classes_sizes_and_widths(untrained):
    model = AutoModelForImageTextToText.from_pretrained(untrained)
    assert type(model) is Qwen2VLForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(untrained)) is Qwen2VLProcessor
    assert 2e6 < model.num_parameters() < 6e6
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0, name
            assert module.out_features % 64 == 0, name


def test_text_is_one_token_a_character_and_comes_back(untrained):
    tokenizer = AutoProcessor.from_pretrained(untrained).tokenizer
    for text in ("0123456789", "Invoice", "$12.50", "user", "a b"):
        assert len(tokenizer(text).input_ids) == len(text)
    for text in ("héllo, Wörld", "€ 5\n\ttwo", "the assistant"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("<|im_start|>assistant\n").input_ids) == 2
    assert max(tokenizer.get_vocab().values()) < 320


def test_an_image_keeps_its_pixels_and_is_sixteen_tokens(untrained):
    from printing import print_text

    processor = AutoProcessor.from_pretrained(untrained)
    image = print_text("42", random.Random(0))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    batch = processor(images=[image], text=[text], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 16]]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16
    first = batch["pixel_values"][0].view(3, 2, 8, 8)[0, 0]  # the upper left patch
    assert torch.allclose(first, torch.from_numpy(np.array(image)[:8, :8] / 127.5 - 1).float(), atol=1e-5)


def test_samples_depend_on_index_and_seed_alone():
    from curriculum import PrintedText

    def looks(dataset, index):
        user, assistant = dataset[index]["messages"]
        return user["content"][0]["image"].tobytes(), assistant["content"][0]["text"]

    dataset = PrintedText(1000, seed=1, growth=0.5)
    later = looks(dataset, 900)
    assert looks(PrintedText(1000, seed=1, growth=0.5), 900) == later
    assert looks(PrintedText(1000, seed=2, growth=0.5), 900) != later
    assert looks(dataset, 901) != later
    with pytest.raises(IndexError):
        dataset[1000]


def test_strings_grow_and_no_held_out_string_is_trained_on():
    from curriculum import LONGEST, PrintedText
    from words import HELD_OUT_WORDS, held_out, measured_text, training_text

    dataset = PrintedText(1000, seed=0, growth=0.5)
    assert [dataset.longest(i) for i in (0, 250, 500, 999)] == [1, 1 + (LONGEST - 1) // 2, LONGEST, LONGEST]
    rng = random.Random(0)
    trained = {training_text(rng, min(length, LONGEST)) for length in range(1, 40) for _ in range(200)}
    assert max(map(len, trained)) == LONGEST
    assert not any(held_out(text) for text in trained)
    assert not set(HELD_OUT_WORDS) & {text.lower() for text in trained}
    for kind in ("digits", "letters", "words"):
        measured = {measured_text(rng, kind) for _ in range(200)}
        assert all(held_out(text) for text in measured)
        assert not measured & trained


def test_print_is_legible_size_and_stays_inside():
    from printing import HEIGHT, WIDTH, print_text

    rng = random.Random(0)
    for text in ("1", "123456", "september"):
        for _ in range(20):
            pixels = np.asarray(print_text(text, rng, clean=True)).astype(int)
            assert pixels.shape == (HEIGHT, WIDTH)
            paper = np.bincount(pixels.ravel()).argmax()
            ink = np.abs(pixels - paper) > 30
            assert ink.sum() > 12 * len(text)
            assert ink[:, -1].sum() <= HEIGHT // 4  # nothing is cut off at the right but the tail of a slanted letter


def test_a_short_run_writes_a_checkpoint_and_its_figures(tmp_path):
    command = [sys.executable, str(HERE / "pretrain.py"), "--output", str(tmp_path / "out")]
    small = ["--steps", "2", "--batch", "4", "--workers", "0", "--measure", "4"]
    subprocess.run([*command, *small], check=True, capture_output=True, text=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [step for step, _ in results["loss"]] == [1, 2]
    assert results["exact_match"]["digits"] == 0.0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 10e6
    again = subprocess.run([*command, *small], check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already holds a checkpoint" in again.stderr
