"""Memory that is used again: it holds as long as is promised, and each thread has its own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fvlm_core.errors import CheckpointError
from fvlm_export import staging
from fvlm_export.safetensor_file import SafetensorFile, as_bytes
from fvlm_export.staging import Scratch, Upload


@pytest.mark.parametrize("count", [1, 2])
def test_scratch_holds_as_long_as_is_promised_and_is_a_threads_own(count: int) -> None:
    scratch = Scratch(count, locked=False)
    held = [scratch.take((3, 4), torch.float32).fill_(number) for number in range(count)]

    def other() -> None:
        for _ in range(3):
            scratch.take((3, 4), torch.float32).fill_(9)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert [bool((value == number).all()) for number, value in enumerate(held)] == [True] * count
    again = scratch.take((2, 6), torch.bfloat16)
    assert (again.shape, again.dtype) == ((2, 6), torch.bfloat16)
    assert again.data_ptr() == held[0].data_ptr(), "memory is used again"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_an_uploaded_tensor_is_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(staging, "PIECE", 7 * 16)  # several pieces, the last one shorter
    tensors = {
        name: torch.randn(shape).mul(50).to(dtype) for name, shape in {"a": (31, 9), "b": (), "c": (0, 3)}.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file, upload = SafetensorFile(tmp_path / "x.safetensors"), Upload()
    for name, wanted in tensors.items():
        found = upload(file, name, torch.device("cpu"))
        assert found.dtype == dtype
        assert torch.equal(found, wanted)
        whole = torch.empty_like(wanted)
        file.read(name, as_bytes(whole))
        assert torch.equal(whole, wanted)
    with (tmp_path / "x.safetensors").open("r+b") as torn:
        torn.truncate(file.start + 40)
    with pytest.raises(CheckpointError, match="was cut while it was read"):
        upload(file, "a", torch.device("cpu"))
    with pytest.raises(CheckpointError, match="was cut while it was read"):
        file.read("a", as_bytes(torch.empty_like(tensors["a"])))
