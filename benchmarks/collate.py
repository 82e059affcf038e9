"""Benchmark collating images for Qwen2-VL beside the stock processor's own path, on one core.

    python -m benchmarks.collate [--out FILE.jsonl] [--batches 20] [--workers 0 2 4]

Both sides get the same conversations with one 512 × 512 image each, as an open PIL image, a PNG or a JPEG, and make
the batch that the model is trained on: stock decodes, renders the chat template and calls the processor; the collator
does what `FastVisionTrainer`'s dataloader has it do. What the device does afterwards to bytes (`fvlm_vision.pixels`) is
timed on its own, on the CPU, where it is slowest. Sides take turns of five batches, since a worker does one thing all
the time, and memory that it has given back it gets again without the kernel. Times are of the processor and not of
the wall, so that another job on the machine counts little. Only with workers is it the wall's time, from the first
batch on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torchvision
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core.testing import tiny_checkpoint
from fvlm_vision import FastVisionDataCollator
from fvlm_vision.pixels import with_pixel_values
from fvlm_vision.rows import NumberedRows

SIDE, BATCH = 512, 8
TURN = 5  # batches
SOURCES = ("PIL", "PNG", "JPEG")
Sample = dict[str, Any]


def picture(seed: int) -> Image.Image:
    """Return smooth noise: it compresses about as a photograph does, and no two are the same."""
    small = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def stored(image: Image.Image, kind: str) -> Any:
    """Return an image as a sample holds it."""
    if kind == "PIL":
        return image
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def sample(image: Any) -> Sample:
    """Return a conversation about an image."""
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What does this page say?"}]
    answer = "It is a page of seven lines, and the last of them says: " + "paid in full. " * 8
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def stock(processor: Any, samples: Sequence[Sample]) -> Any:
    """Return the batch of the plain way: decode, render, one call of the processor, labels without padding."""
    images = [s["messages"][0]["content"][0]["image"] for s in samples]
    images = [Image.open(io.BytesIO(i)).convert("RGB") if isinstance(i, bytes) else i for i in images]
    batch = processor(
        text=[processor.apply_chat_template(s["messages"], tokenize=False) for s in samples],
        images=[[image] for image in images],
        padding=True,
        return_tensors="pt",
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def timed(sides: dict[str, Callable[[], Any]], batches: int) -> dict[str, list[float]]:
    """Return the processor time of each side's runs, in seconds; the sides take turns, the first is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + -(-batches // TURN)):
        for name, side in sides.items():
            for _ in range(TURN):
                start = time.process_time()
                side()
                if turn:
                    times[name].append(time.process_time() - start)
    return times


def one_core(processor: Any, collator: FastVisionDataCollator, batches: int) -> list[dict[str, Any]]:
    """Return a row a source: images a second of both sides on one core."""
    rows = []
    for kind in SOURCES:
        samples = [sample(stored(picture(seed), kind)) for seed in range(BATCH)]
        made = collator(samples)
        sides: dict[str, Callable[[], Any]] = {
            "stock": partial(stock, processor, samples),
            "fvlm": partial(collator, samples),
            "device": partial(with_pixel_values, made),
        }
        if not torch.equal(with_pixel_values(made)["pixel_values"], stock(processor, samples)["pixel_values"]):
            raise SystemExit(f"{kind}: the collator's pixels are not the stock processor's; nothing is measured.")
        median = {name: statistics.median(values) for name, values in timed(sides, batches).items()}
        rows.append(
            {
                "op": "collate",
                "source": kind,
                "stock_images_s": round(BATCH / median["stock"], 1),
                "fvlm_images_s": round(BATCH / median["fvlm"], 1),
                "ratio": round(median["stock"] / median["fvlm"], 2),
                "on_device_ms": round(median["device"] * 1e3, 2),
            }
        )
    return rows


def with_workers(collator: FastVisionDataCollator, workers: int, batches: int) -> dict[str, Any]:
    """Return a row: images a second of a dataloader, JPEG, by the wall."""
    samples = NumberedRows([sample(stored(picture(seed), "JPEG")) for seed in range(BATCH)] * batches)
    loader = iter(DataLoader(samples, batch_size=BATCH, num_workers=workers, collate_fn=collator))
    next(loader)
    start = time.perf_counter()
    images = BATCH * sum(1 for _ in loader)
    return {"op": "collate_workers", "workers": workers, "images_s": round(images / (time.perf_counter() - start), 1)}


def provenance() -> dict[str, Any]:
    """Return where and with what a row was measured."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
        "side": SIDE,
        "batch": BATCH,
    }


def main() -> None:
    """Measure, print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = provenance()  # before a row is written, which makes the working tree dirty
    with tempfile.TemporaryDirectory() as folder:
        tiny_checkpoint("qwen2_vl", folder)
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # of the real model
    collator = FastVisionDataCollator(model, processor).keeping_bytes()
    rows = one_core(processor, collator, options.batches)
    rows += [with_workers(collator, workers, options.batches) for workers in options.workers]
    for row in rows:
        print(json.dumps(row))
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps({**row, **where}) + "\n")


if __name__ == "__main__":
    main()
