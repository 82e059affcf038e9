"""Pretrain the tiny VLM that ``fvlm quickstart`` ships, from nothing, with FVLM itself.

    uv run python examples/tiny_vlm/pretrain.py --output /tmp/tiny_vlm

writes the checkpoint (bf16 safetensors, tokenizer, processor) and ``results.json`` with what it reads. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parents[1] / "packages" / "fvlm-cli" / "src" / "fvlm_cli" / "assets" / "tiny_vlm"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint; must not hold one")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="its peak (default %(default)s)")
    parser.add_argument("--growth", type=float, default=0.5, help="fraction of the run over which strings grow longer")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the samples (default %(default)s)")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="processes that render")
    parser.add_argument("--measure", type=int, default=1000, help="held-out images of each kind (default %(default)s)")
    parser.add_argument(
        "--ship", action="store_true", help=f"also copy the checkpoint to {SHIPPED.relative_to(HERE.parents[1])}"
    )
    options = parser.parse_args(given)
    for name in ("steps", "batch", "measure"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if (options.output / "config.json").exists():
        parser.error(f"--output {options.output} already holds a checkpoint: give another folder or remove it")
    return options


def train(base: Path, options: argparse.Namespace, logs: Path) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Train every weight of the checkpoint in ``base``; return the model, its processor and the log."""
    import torch
    from curriculum import PrintedText
    from trl import SFTConfig

    from fvlm_vision import FastVisionDataCollator, FastVisionModel, FastVisionTrainer

    model, processor = FastVisionModel.from_pretrained(
        str(base), full_finetuning=True, dtype=torch.float32, use_gradient_checkpointing=False
    )
    FastVisionModel.for_training(model)
    gpu = torch.cuda.is_available()
    config = SFTConfig(
        output_dir=str(logs),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        train_sampling_strategy="sequential",
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(300, options.steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        bf16=False,  # fp32 weights, as loaded; a GPU multiplies them in TF32
        tf32=True if gpu else None,
        gradient_checkpointing=False,
        dataloader_num_workers=options.workers,
        dataloader_prefetch_factor=4 if options.workers else None,
        dataloader_persistent_workers=options.workers > 0,
        logging_steps=max(1, min(100, options.steps // 20)),
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        seed=options.seed,
        max_length=None,
    )
    trainer = FastVisionTrainer(
        model=model,
        processing_class=processor,
        data_collator=FastVisionDataCollator(model, processor, train_on_responses_only=True),
        train_dataset=PrintedText(options.steps * options.batch, options.seed, options.growth),
        args=config,
    )
    trainer.train()
    return model, processor, trainer.state.log_history


def main(given: list[str] | None = None) -> None:
    """Write the untrained checkpoint, train it, store it in bf16, measure what was stored."""
    options = arguments(given)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    import torch
    from architecture import write_untrained
    from measure import measure

    from fvlm_vision import FastVisionModel

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tiny_vlm-") as folder:
        base = write_untrained(Path(folder) / "untrained", options.seed)
        model, processor, log = train(base, options, Path(folder) / "trainer")
    seconds = time.perf_counter() - begun
    FastVisionModel.for_inference(model)  # also in the config that is saved: with the key-value cache
    model.to(torch.bfloat16).save_pretrained(options.output)
    processor.save_pretrained(options.output)
    results = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: getattr(options, name) for name in ("steps", "batch", "learning_rate", "growth", "seed")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "train_seconds": round(seconds, 1),
        "loss": [[entry["step"], round(entry["loss"], 4)] for entry in log if "loss" in entry],
        "measured_on": options.measure,
        "exact_match": measure(options.output, options.measure),
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in results.items() if key != "loss"}, indent=1))
    if options.ship:
        ship(options.output)


def ship(checkpoint: Path) -> None:
    """Copy a checkpoint to where ``fvlm quickstart`` finds it, and its figures into the recipe's folder."""
    SHIPPED.mkdir(parents=True, exist_ok=True)
    for file in sorted(checkpoint.iterdir()):
        shutil.copyfile(file, SHIPPED / file.name)
    shutil.copyfile(checkpoint / "results.json", HERE / "results.json")
    print(f"shipped to {SHIPPED}")


if __name__ == "__main__":
    main()
