"""Where the kernels run in these tests: on the GPU if there is one, else on the CPU under Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

GPU_REQUIRED = os.environ.get("FVLM_GPU", "0") == "1"
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is decorated


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make `-m gpu` run every kernel on the GPU, not only what cannot run elsewhere.

    Pytest hands over the items of the whole run: those of other folders, which name their devices otherwise, are left.
    """
    if HAS_GPU or GPU_REQUIRED:
        for item in items:
            if "device" in getattr(item, "fixturenames", ()) and item.path.is_relative_to(Path(__file__).parent):
                item.add_marker("gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not HAS_GPU:
        if GPU_REQUIRED:
            pytest.fail("FVLM_GPU=1 but torch finds no CUDA device")
        pytest.skip("needs a CUDA device")


@pytest.fixture
def device() -> torch.device:
    if HAS_GPU:
        return torch.device("cuda")
    if GPU_REQUIRED:
        pytest.fail("FVLM_GPU=1 but torch finds no CUDA device")
    from fvlm_kernels._triton import HAS_TRITON, INTERPRETED

    if not HAS_TRITON:
        pytest.skip("Triton is not installed on this platform")
    if not INTERPRETED:
        pytest.fail("triton was imported before this conftest; run these tests in a process of their own")
    return torch.device("cpu")


# The interpreter truncates to bfloat16 instead of rounding, so bfloat16 is held to the policy on a GPU only.
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen
