"""Fine-tune on a plain Python list of conversations with pictures: here, real handwritten digits.

uv run python examples/programs/ocr_training.py [--model FOLDER_OR_HUB_ID] [--steps 100]
"""

import argparse

from basic import load
from trl import SFTConfig

from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings
from fvlm_vision import FastVisionDataCollator as UnslothVisionDataCollator
from fvlm_vision import FastVisionModel
from fvlm_vision import FastVisionTrainer as SFTTrainer


def conversations(count):
    """Return a plain list of samples: a system, a user and an assistant message each."""
    return [
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "You read what is written in pictures."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is written here?"},
                        {"type": "image", "image": writing.image},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": writing.text}]},
            ]
        }
        for writing in writings(count, seed=0, test=False)
    ]


def train(model_name, max_steps=100, output_dir="vision_output"):
    """Train, and return the model, the processor and the trainer."""
    model, tokenizer = load(model_name)
    the_list = conversations(64)
    FastVisionModel.for_training(model)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        data_collator=UnslothVisionDataCollator(model, tokenizer),
        train_dataset=the_list,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=max_steps,
            learning_rate=2e-4,
            output_dir=output_dir,
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )
    trainer.train()
    return model, tokenizer, trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=shipped_checkpoint())
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    train(arguments.model, arguments.steps)
