"""What all the test runs share: where the tests marked `gpu` run, and a stock that does not depend on the CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none, unless FVLM_GPU=1 says that there is: then they run and fail."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or os.environ.get("FVLM_GPU") == "1":
        return
    import torch  # only where a test is marked: the tools' own tests need no torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _gpu_is_there(request: pytest.FixtureRequest) -> None:
    """Fail a test marked `gpu` in one sentence where the run was told that it has a GPU and has none."""
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.fail("FVLM_GPU=1 says that this machine has a CUDA device, but torch finds none")


@pytest.fixture(autouse=True, scope="session")
def _one_stock_on_every_cpu() -> Iterator[None]:
    """Keep bitsandbytes from packing NF4 weights for AVX512-BF16, which makes stock models compute in bfloat16.

    What stock computes would otherwise depend on the CPU that the tests run on. FVLM's own models never do it
    (`fvlm_core.quantized.keep_stored_layout`, tested with this undone).
    """
    if find_spec("bitsandbytes") is None:
        yield
        return
    import bitsandbytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """Undo what a command that runs within a test does to the packages' log, which the tests after it read."""
    loggers = [logging.getLogger(name) for name in ("fvlm_core", "fvlm_export", "fvlm_vision", "fvlm_cli")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _exact_convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stock's patch embeddings compute in fp32 on a GPU, where PyTorch takes TF32 for convolutions by itself."""
    if request.node.get_closest_marker("gpu"):
        import torch

        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
