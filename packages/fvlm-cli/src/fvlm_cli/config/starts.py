"""What `fvlm init` proposes for each model family and data format; everything else is the schema's default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fvlm_core.arch import TABLE


@dataclass(frozen=True)
class Family:
    """A family's start.

    Attributes:
        model: a checkpoint on the Hub that people start with.
        turns: what its chat template opens a user and an assistant turn with.
    """

    model: str
    turns: tuple[str, str]


def _family(model: str, model_type: str) -> Family:
    turns = TABLE[model_type].turns
    if turns is None:
        raise RuntimeError(f"the facts of {model_type} say nothing of turns")
    return Family(model, turns)


FAMILIES: dict[str, Family] = {
    "qwen2_vl": _family("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl"),
    "qwen2_5_vl": _family("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl"),
    "qwen3_vl": _family("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl"),
    "mllama": _family("meta-llama/Llama-3.2-11B-Vision-Instruct", "mllama"),
    "pixtral": _family("mistral-community/pixtral-12b", "llava"),
    "mistral3": _family("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3"),
    "gemma3": _family("google/gemma-3-4b-it", "gemma3"),
}

FORMATS: dict[str, Mapping[str, Any]] = {
    "messages": {"train": "train.jsonl"},
    "sharegpt": {"train": "train.json", "image_folder": "images"},
    "prompt": {"train": "train.jsonl", "columns": {"prompt": "question", "completion": "answer", "image": "image"}},
    "csv": {"train": "train.csv", "columns": {"prompt": "question", "completion": "answer", "image": "file"}},
    "parquet": {"train": "train.parquet"},
    "folder": {"train": "images", "caption_prompt": "Describe this image."},
    "mix": {"train": [{"path": "receipts.jsonl", "weight": 3.0}, {"path": "photos", "weight": 1.0}]},
    "stream": {"train": "train.jsonl", "eval": "eval.jsonl", "streaming": True},
}

WHAT: dict[str, str] = {
    "messages": 'JSONL: {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, …]}, …]}',
    "sharegpt": 'JSON of LLaVA: [{"conversations": [{"from": "human", "value": "<image>\\n…"}, …], "image": "a.png"}]',
    "prompt": 'JSONL: {"question": "…", "answer": "…", "image": "a.png"}; data.columns says what is what',
    "csv": "CSV with the columns question, answer and file; data.columns says what is what",
    "parquet": "Parquet with messages, or prompt and completion, and images as datasets writes them",
    "folder": "a folder of images, each with a .txt file of the same name beside it",
    "mix": "JSONL of messages and a folder of images with captions, three rows of the first for one of the second",
    "stream": "JSONL of messages, too many to hold: they are read as they are needed",
}
