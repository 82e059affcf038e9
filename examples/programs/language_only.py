"""Adapt the language model alone: the vision tower has nothing trainable and keeps no activations for backward.

uv run python examples/programs/language_only.py [--model FOLDER_OR_HUB_ID] [--steps 100]
"""

import argparse

from ocr_training import conversations
from trl import SFTConfig

from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_vision import FastVisionDataCollator as UnslothVisionDataCollator
from fvlm_vision import FastVisionModel
from fvlm_vision import FastVisionTrainer as SFTTrainer


def train(model_name, max_steps=100, output_dir="vision_output"):
    """Train, and return the model, the processor and the trainer."""
    model, tokenizer = FastVisionModel.from_pretrained(model_name=model_name, max_seq_length=2048, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=False,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    FastVisionModel.for_training(model)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        data_collator=UnslothVisionDataCollator(model, tokenizer),
        train_dataset=conversations(64),
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=max_steps,
            learning_rate=2e-4,
            output_dir=output_dir,
        ),
    )
    trainer.train()
    return model, tokenizer, trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=shipped_checkpoint())
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    model, _, _ = train(arguments.model, arguments.steps)
    print(model.fvlm_targets)
