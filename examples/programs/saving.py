"""Train, save the adapter and the processor, and push the merged model.

    uv run python examples/programs/saving.py --repo user/name [--model FOLDER_OR_HUB_ID] [--steps 100]

The token is read from the environment variable HF_TOKEN. Without `--repo` the merged model is saved to a folder.
"""

import argparse
import os

from ocr_training import train

from fvlm_cli.quickstart.folders import shipped_checkpoint


def save(model, tokenizer, directory):
    """Save the adapter and the processor."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def push(model, tokenizer, repo, token):
    """Merge and push; return the address of the commit."""
    return model.push_to_hub_merged(repo, tokenizer, token=token)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=shipped_checkpoint())
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="vision_output")
    parser.add_argument("--repo")
    arguments = parser.parse_args()
    model, tokenizer, _ = train(arguments.model, arguments.steps, arguments.output)
    save(model, tokenizer, f"{arguments.output}/adapter")
    if arguments.repo:
        print(push(model, tokenizer, arguments.repo, os.environ["HF_TOKEN"]))
    else:
        print(model.save_pretrained_merged(f"{arguments.output}/merged", tokenizer))
