"""A training config as YAML in which every key is explained and those that are not set are commented out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from fvlm_cli.config.schema import Section, TrainConfig
from fvlm_cli.config.starts import FAMILIES, FORMATS, WHAT

_WIDTH = 100


def start_config(family: str | None, data: str, model: str | None, train: str | None) -> str:
    """Return the text of a config to start from.

    Args:
        family: a key of `FAMILIES`; None for another family, which needs `model`.
        data: a key of `FORMATS`.
        model: folder or Hub id, instead of the family's usual checkpoint.
        train: the data file or folder, instead of the format's usual name.
    """
    start = None if family is None else FAMILIES[family]
    name = model or (start.model if start is not None else "")
    names = ("instruction_part", "response_part")
    parts = {} if start is None else dict(zip(names, start.turns, strict=True))
    values: dict[str, Mapping[str, Any]] = {
        "model": {"name": name, "precision": "4bit", "max_seq_length": 2048, "gradient_checkpointing": "offload"},
        "lora": {"finetune_vision_layers": True, "finetune_language_layers": True, "r": 16, "alpha": 32},
        "data": {
            **FORMATS[data],
            **({} if train is None else {"train": train}),
            **({} if "eval" in FORMATS[data] else {"eval_fraction": 0.05}),
            **({"train_on_responses_only": True, **parts} if parts else {}),
        },
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            **({"max_steps": 1000} if "streaming" in FORMATS[data] else {}),
            "learning_rate": 2e-4,
            "warmup_steps": 5,
        },
        "eval": {"rows": 16},
        "save": {"output_dir": "fvlm-run"},
    }
    head = (
        f"# A training config of FVLM: {name}, trained on {WHAT[data]}.\n"
        "# What is commented out stands at its default. fvlm preview CONFIG shows what training will see,\n"
        "# fvlm train CONFIG trains, and any key can be replaced on the command line: fvlm train CONFIG lora.r=32\n"
    )
    sections = [_section(name, field, values[name]) for name, field in TrainConfig.model_fields.items()]
    return "\n".join([head, *sections])


def _section(name: str, field: FieldInfo, values: Mapping[str, Any]) -> str:
    kind = field.annotation
    if not (isinstance(kind, type) and issubclass(kind, Section)):
        raise TypeError(f"{name} of TrainConfig is no section")
    about = (kind.__doc__ or "").strip().splitlines()[0]
    lines = [f"# {about}", f"{name}:"]
    for key, inner in kind.model_fields.items():
        lines += [f"  # {line}" for line in textwrap.wrap(inner.description or "", _WIDTH - 4)]
        lines.append(_entry(key, inner, values))
    return "\n".join(lines) + "\n"


def _entry(key: str, field: FieldInfo, values: Mapping[str, Any]) -> str:
    if key in values:
        return f"  {_yaml(key, values[key])}"
    default = field.get_default(call_default_factory=True, validated_data={})
    return f"  # {_yaml(key, default)}"


def _yaml(key: str, value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return f"{key}: {json.dumps(value, ensure_ascii=False)}"  # YAML reads JSON strings; its own would be spread out
    text = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return text.strip()[1:-1]
