"""Tiny checkpoints and meta-device skeletons of the families, each made once a session."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fvlm_core.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family → the folder of its tiny checkpoint; read it, do not write into it."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def build(family: str) -> Path:
        return tiny_checkpoint(family, root / family)

    return build


@pytest.fixture(scope="session")
def skeleton() -> Callable[[str], Any]:
    """Family → its tiny model on the meta device: module tree and config, no weights; do not change it."""
    import torch
    from transformers import AutoModelForImageTextToText

    from fvlm_core.testing.checkpoint import blueprint

    @cache
    def build(family: str) -> Any:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(blueprint(family).config)

    return build


@pytest.fixture(scope="session")
def fused(tiny: Callable[[str], Path]) -> Any:
    """A fused Qwen2-VL with adapters on both towers; do not change it."""
    from fused_tools import adapted_model

    from fvlm_core.fused import fuse_model

    model = adapted_model(tiny("qwen2_vl"))
    fuse_model(model)
    return model


@pytest.fixture
def model(fused: Any) -> Any:
    """A copy of the fused model."""
    return copy.deepcopy(fused)
