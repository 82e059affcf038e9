"""The checkpoint that the package ships: small, real, and able to read print."""

from __future__ import annotations

import json
import random
from importlib import metadata
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import HEIGHT, WIDTH
from fvlm_cli.quickstart.reading import PROMPT, exact_match, transcribe


@pytest.fixture(scope="module")
def loaded():
    folder = shipped_checkpoint()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def _printed(count: int) -> tuple[list[Image.Image], list[str]]:
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 20)
    rng = random.Random(4)
    texts = ["".join(rng.choices("0123456789", k=rng.randint(3, 6))) for _ in range(count)]
    images = []
    for text in texts:
        image = Image.new("L", (WIDTH, HEIGHT), 240)
        ImageDraw.Draw(image).text((rng.randint(3, 30), 4), text, font=font, fill=30)
        images.append(image)
    return images, texts


def test_size_classes_and_widths(loaded):
    model, processor = loaded
    assert sum(file.stat().st_size for file in shipped_checkpoint().glob("*.safetensors")) <= 10e6
    with safe_open(shipped_checkpoint() / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert type(model) is Qwen2VLForConditionalGeneration
    assert type(processor) is Qwen2VLProcessor
    assert 2e6 <= model.num_parameters() <= 6e6
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.in_features % 64 == 0 == linear.out_features % 64 for linear in linears)


def test_it_reads_printed_digits(loaded):
    images, texts = _printed(60)
    assert exact_match(transcribe(*loaded, images), texts) >= 0.95


def test_a_batch_reads_as_one_by_one(loaded):
    model, processor = loaded
    images, _ = _printed(5)
    images += [image.resize((WIDTH, HEIGHT)).rotate(180) for image in images]  # upside down: answers nobody foresees
    alone = []
    for image in images:
        message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]}
        inputs = processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        alone.append(processor.decode(tokens, skip_special_tokens=True))
    done: list[int] = []
    assert transcribe(model, processor, images, batch_size=4, progress=done.append) == alone
    assert done == [4, 4, 2]


def test_the_figures_it_was_shipped_with():
    results = json.loads((shipped_checkpoint() / "results.json").read_text())
    assert results["measured_on"] >= 500
    assert results["exact_match"]["digits"] >= 0.95
    assert results["exact_match"]["handwritten"] <= 0.40


def test_it_is_part_of_the_installed_package():
    assert metadata.version("fvlm-cli")
    import fvlm_cli

    assert shipped_checkpoint().is_relative_to(Path(fvlm_cli.__file__).parent)
