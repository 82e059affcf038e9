"""Checkpoints that several cross-package tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def qwen2_vl_folder(tmp_path_factory):
    """A tiny random Qwen2-VL in fp32."""
    from fvlm_core.testing import tiny_checkpoint

    return tiny_checkpoint("qwen2_vl", tmp_path_factory.mktemp("zoo") / "qwen2_vl", dtype=torch.float32)


@pytest.fixture(scope="session")
def model_of_the_docs(tmp_path_factory):
    """What stands in for the checkpoint on the Hub that the documentation names."""
    from docs_tools import stand_in

    return stand_in(tmp_path_factory.mktemp("hub") / "model")
