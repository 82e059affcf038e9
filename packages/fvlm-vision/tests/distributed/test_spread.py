"""One process whose model lies on two GPUs learns what it learns on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from trl import SFTConfig

from fvlm_core.checkpointing import checkpointing_mode, graphs_of
from fvlm_core.testing import tiny_checkpoint
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer


def samples(count):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        picture = Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8))
        question = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it"}]
        answer = " ".join(("seven", "pages", "of", "paper")[: 1 + number % 4])
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def train(folder, device_map, scratch, mode="offload", **load):
    """Return the trainer after a few steps whose gradients are clipped."""
    options = {"load_in_4bit": True, "dtype": torch.float32, **load}
    model, processor = FastVisionModel.from_pretrained(folder, device_map=device_map, **options)
    model = FastVisionModel.get_peft_model(model, r=8, lora_alpha=16, use_gradient_checkpointing=mode)
    trainer = FastVisionTrainer(
        model=model,
        processing_class=processor,
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=samples(12),
        args=SFTConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=2,
            max_steps=6,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=0.05,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def places(folder, first, second):
    """The vision tower, the embeddings and all but the last layer on one device, the rest on another."""
    model, _ = FastVisionModel.from_pretrained(folder, load_in_16bit=True, device_map="cpu")
    text = model.model.language_model
    last = len(text.layers) - 1
    found = {"model.visual": first, "lm_head": first, "model.language_model.embed_tokens": first}
    found |= {f"model.language_model.layers.{n}": first if n < last else second for n in range(last + 1)}
    return found | {"model.language_model.norm": second, "model.language_model.rotary_emb": first}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["offload", "auto", False])
def test_a_model_on_two_gpus_learns_what_one_on_one_does(tmp_path, mode):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    folder = tiny_checkpoint("qwen2_vl", tmp_path / "tiny", dtype=torch.float32)
    one = train(folder, "cuda:0", tmp_path / "one", mode)
    both = train(folder, places(folder, 0, 1), tmp_path / "both", mode)
    assert {p.device.index for p in both.model.parameters()} == {0, 1}
    assert graphs_of(both.model) is None
    assert checkpointing_mode(both.model) == (mode and "offload")
    assert both._flat is not None
    assert losses(both) == pytest.approx(losses(one), rel=2e-3)
    assert losses(both)[-1] < losses(both)[0]


def test_the_places_are_all_of_the_model(tmp_path):
    """The test above runs where there are two GPUs; here is that its map is one, and that it trains."""
    folder = tiny_checkpoint("qwen2_vl", tmp_path / "tiny", dtype=torch.float32)
    mapped = train(folder, places(folder, "cpu", "cpu"), tmp_path / "mapped")
    assert losses(mapped) == pytest.approx(losses(train(folder, "cpu", tmp_path / "plain")), rel=1e-6)
