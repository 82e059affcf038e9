"""A blueprint (config and processor) → a folder with random weights that stock transformers loads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from fvlm_core.errors import ConfigError, MissingExtraError
from fvlm_core.testing.blueprint import Blueprint
from fvlm_core.testing.families import BUILDERS, NEEDS


def blueprint(family: str) -> Blueprint:
    """Return a family's config and processor.

    Raises:
        ConfigError: no tiny checkpoint exists for that family.
        MissingExtraError: the family's processor class needs a package that is not installed.
    """
    if family not in BUILDERS:
        raise ConfigError(f"family={family!r} has no tiny checkpoint: use one of {', '.join(BUILDERS)}.")
    if family in NEEDS and find_spec(NEEDS[family]) is None:
        raise MissingExtraError(f"The {family} processor needs {NEEDS[family]}: pip install {NEEDS[family]}.")
    builder: Callable[[], Blueprint] = getattr(importlib.import_module(BUILDERS[family]), family)
    return builder()


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter a value that matters.

    The library's own initialization leaves biases at 0, norms at 1 and mllama's gates shut, so a test on it would not
    see a forgotten bias, norm weight or cross-attention layer.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim <= 1:
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(noise * min(0.1, parameter[0].numel() ** -0.5))


def tiny_checkpoint(
    family: str,
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a tiny random checkpoint of a family: config, weights, tokenizer, processor, chat template.

    The weights depend on ``family``, ``dtype`` and ``seed`` alone; the global random state is left as it was.

    Args:
        family: one of `fvlm_core.testing.FAMILIES`.
        folder: where to write; made if missing.
        dtype: of the stored weights.
        seed: of the weights.
        max_shard_size: as in ``PreTrainedModel.save_pretrained``; ``"200KB"`` gives a checkpoint of several shards.

    Returns:
        The folder.

    Raises:
        ConfigError: ``family`` has no tiny checkpoint.
        MissingExtraError: the family's processor class needs a package that is not installed.
    """
    plan = blueprint(family)
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(plan.config, dtype=torch.float32)
    _randomize(model, seed)
    model.to(dtype)  # save_pretrained stores it as the config's dtype
    tokenizer = plan.processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    plan.processor.save_pretrained(folder)
    return folder
