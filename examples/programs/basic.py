"""Load a vision-language model in 4 bit and put LoRA on its vision tower and its language model.

    uv run python examples/programs/basic.py [--model FOLDER_OR_HUB_ID]

Without `--model` it uses the tiny model that comes with fvlm-cli.
"""

import argparse

from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_vision import FastVisionModel


def load(model_name):
    """Return the model with adapters, and its processor."""
    model, tokenizer = FastVisionModel.from_pretrained(
        model_name=model_name,
        max_seq_length=2048,
        load_in_4bit=True,
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=True,
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
    return model, tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=shipped_checkpoint())
    model, tokenizer = load(parser.parse_args().model)
    print(model.fvlm_targets)
    model.print_trainable_parameters()
