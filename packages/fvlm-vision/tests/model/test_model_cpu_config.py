"""On a machine without an accelerator TRL's configuration can be made as the unchanged programs make it."""

import pytest
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from fvlm_vision.cpu_config import let_defaults_fit_the_cpu, restore_defaults


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: False)
    restore_defaults()
    yield
    restore_defaults()


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="transformers asks the device itself")
def test_the_default_fits_and_an_explicit_wish_is_still_refused(no_accelerator, tmp_path):
    with pytest.raises(ValueError, match="bf16"):
        SFTConfig(output_dir=str(tmp_path))
    assert let_defaults_fit_the_cpu()
    assert let_defaults_fit_the_cpu()  # a second model changes nothing more
    assert SFTConfig(output_dir=str(tmp_path)).bf16 is False
    with pytest.raises(ValueError, match="bf16"):
        SFTConfig(output_dir=str(tmp_path), bf16=True)
    restore_defaults()
    with pytest.raises(ValueError, match="bf16"):
        SFTConfig(output_dir=str(tmp_path))


def test_nothing_changes_where_a_device_has_bf16(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: True)
    restore_defaults()
    before = SFTConfig.__post_init__
    assert not let_defaults_fit_the_cpu()
    assert SFTConfig.__post_init__ is before
