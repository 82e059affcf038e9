"""Fine-tune on several GPUs: the program for one, started once for each.

    torchrun --nproc-per-node 2 examples/distributed/train.py [--model FOLDER_OR_HUB_ID] [--steps 100] [--batch 4]

Without `--model` it trains the tiny model that comes with fvlm-cli to read handwritten digits. Without a GPU the
processes share the CPU. `python examples/distributed/train.py --batch 8` learns the same in one process.
"""

import argparse
from pathlib import Path

import torch
from trl import SFTConfig

from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings
from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer


def samples(count):
    """Return questions about pictures of handwriting, with their answers."""
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": writing.image}, {"type": "text", "text": "Read it."}],
                },
                {"role": "assistant", "content": writing.text},
            ]
        }
        for writing in writings(count, seed=0, test=False)
    ]


def main():
    """Train, save the adapter and the merged model, and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=shipped_checkpoint())
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="samples of each process")
    parser.add_argument("--output", type=Path, default=Path("distributed_output"))
    options = parser.parse_args()
    # Every process loads the whole model onto its own GPU: device_map is left at its default.
    model, processor = FastVisionModel.from_pretrained(options.model, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=32)
    trainer = FastVisionTrainer(
        model=model,
        processing_class=processor,
        data_collator=FastVisionDataCollator(model, processor, train_on_responses_only=True),
        train_dataset=samples(64),  # all rows in every process: the trainer deals them out
        args=SFTConfig(
            output_dir=str(options.output),
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
    )
    trainer.train()
    trainer.save_model(str(options.output / "adapter"))  # the first process writes, in this and in the next line
    merged = model.save_pretrained_merged(options.output / "merged", processor, overwrite=True)
    trainer.accelerator.wait_for_everyone()  # from here on every process may read what the first one wrote
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{trainer.args.world_size} processes: loss {losses[0]:.6f} to {losses[-1]:.6f}; merged: {merged}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
