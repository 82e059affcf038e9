"""Two runs with one seed: the same losses and the same weights, bit for bit (docs/performance.md says where)."""

from __future__ import annotations

import pytest
import torch
from parity_tools import make_batches, trainable
from transformers import TrainingArguments, set_seed

from fvlm_core.checkpointing import graphs_of, use_graphs
from fvlm_core.graphs import LayerGraphs
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

STEPS = 6


def run(folder, tmp_path, mode, device, seed=11, **lora):
    """Load, adapt and train; return the losses, the weights, and what recorded."""
    set_seed(seed)
    model, processor = FastVisionModel.from_pretrained(
        folder, load_in_4bit=True, fused_layers=True, device_map={"": device}, use_gradient_checkpointing=False
    )
    if device == "cpu":
        use_graphs(model, LayerGraphs(rehearse=True))
    model = FastVisionModel.get_peft_model(model, r=4, random_state=seed, use_gradient_checkpointing=mode, **lora)
    trainer = FastVisionTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=device == "cpu",
            bf16=device != "cpu",
            seed=seed,
        ),
        data_collator=FastVisionDataCollator(model, processor),
        train_dataset=[sample for batch in make_batches(4) for sample in batch],  # shuffled by the seed
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().cpu() for name, p in trainable(model).items()}, graphs_of(model)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("mode", ["offload", "auto"])
def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(qwen2_vl_folder, tmp_path, mode, lora, device):
    first, second = (run(qwen2_vl_folder, tmp_path, mode, device, **lora) for _ in range(2))
    assert len(first[0]) == STEPS
    assert first[0] == second[0]
    for name, weight in first[1].items():
        assert torch.equal(weight, second[1][name]), name
    assert (first[2].recorded > 0) is not bool(lora)
    assert run(qwen2_vl_folder, tmp_path, mode, device, seed=12, **lora)[0] != first[0]
