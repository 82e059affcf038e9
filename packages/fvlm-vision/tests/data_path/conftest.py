"""Tiny checkpoints, images and samples for the tests of the data path and the trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fvlm_core.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint, made once a session."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def processor_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """A fresh processor of a family."""
    return lambda family: AutoProcessor.from_pretrained(checkpoint(family))


@pytest.fixture(scope="session")
def model_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """A fresh tiny model of a family."""
    return lambda family: AutoModelForImageTextToText.from_pretrained(checkpoint(family))


@pytest.fixture(scope="session")
def shared_model_of(model_of: Callable[[str], Any]) -> Callable[[str], Any]:
    """A family's tiny model, loaded once a session, for tests that do not change it."""
    return cache(model_of)


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """A random RGB image of a given size in pixels, different for each seed."""

    def make(width: int = 60, height: int = 60, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="session")
def ask(picture: Callable[..., Image.Image]) -> Callable[..., dict[str, Any]]:
    """A one-question conversation with images inline."""

    def make(
        answer: str = "invoice 42", images: int = 1, seed: int = 0, question: str = "Read this."
    ) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = [
            {"type": "image", "image": picture(60 + 20 * n, 60, seed + n)} for n in range(images)
        ]
        return {
            "messages": [
                {"role": "user", "content": [*blocks, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
        }

    return make
