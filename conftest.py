"""What all the workspace's test runs share: where the tests marked `gpu` run."""

from __future__ import annotations

import os

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
