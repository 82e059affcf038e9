"""Train one process whose model lies on two GPUs, next to the same model on one; print what was found as JSON.

python -m benchmarks.distributed.balanced FOLDER
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
from benchmarks.training.workloads import WORKLOADS, samples
from trl import SFTConfig

from fvlm_core.checkpointing import checkpointing_mode, graphs_of
from fvlm_core.fused import fusion_report
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

TOLERANCE = 0.01


def train(folder: str, device_map: str, steps: int) -> dict[str, Any]:
    """Train for a few steps; return the losses and where the model lay."""
    model, processor = FastVisionModel.from_pretrained(folder, load_in_4bit=True, device_map=device_map)
    model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=32)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = FastVisionTrainer(
            model=model,
            processing_class=processor,
            data_collator=FastVisionDataCollator(model, processor),
            train_dataset=samples(WORKLOADS["ocr"], 2 * steps),
            args=SFTConfig(
                output_dir=scratch,
                per_device_train_batch_size=2,
                max_steps=steps,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                optim="adamw_8bit",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                train_sampling_strategy="sequential",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "mode": checkpointing_mode(model),
        "graphs": graphs_of(model) is not None,
        "fused": fusion_report(model).summary,
    }


def main() -> None:
    """Parse the arguments, train both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    one = train(options.folder, "cuda:0", options.steps)
    torch.cuda.empty_cache()
    both = train(options.folder, "balanced", options.steps)
    distance = max(abs(a - b) / abs(b) for a, b in zip(both["losses"], one["losses"], strict=True))
    right = distance < TOLERANCE and len(both["devices"]) == torch.cuda.device_count() > 1 and not both["graphs"]
    print("RESULT " + json.dumps({"right": right, "apart": distance, "one": one["losses"], **both}))


if __name__ == "__main__":
    main()
