"""fast_inference=True: what vLLM is given, and what is said where there is none or none is asked for."""

import sys
from types import SimpleNamespace

import pytest

from fvlm_core import MissingExtraError
from fvlm_vision import FastVisionModel
from fvlm_vision.engine import check_engine, engine_options


def test_fast_inference_without_vllm_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr("fvlm_vision.engine.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install fvlm-vision\[vllm\]"):
        FastVisionModel.from_pretrained(folder, fast_inference=True)
    check_engine(False, 0.5)


def test_what_is_said_of_an_engine_that_is_not_asked_for_is_warned_of(folder, caplog):
    FastVisionModel.from_pretrained(folder, load_in_16bit=True, gpu_memory_utilization=0.8, max_lora_rank=64)
    assert "gpu_memory_utilization=0.8 does nothing without fast_inference=True." in caplog.messages
    assert "max_lora_rank=64 does nothing without fast_inference=True." in caplog.messages
    caplog.clear()
    FastVisionModel.from_pretrained(folder, load_in_16bit=True, gpu_memory_utilization=0.5)
    assert "does nothing" not in caplog.text


def test_an_engine_is_bound_to_the_model(folder, monkeypatch):
    """vLLM itself is not among the tests' packages: what it is given, and what becomes of it."""

    class LLM:
        def __init__(self, **options):
            self.options = options

        def generate(self, text):
            return f"answer to {text}"

    monkeypatch.setattr("fvlm_vision.engine.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    model, _ = FastVisionModel.from_pretrained(
        folder,
        load_in_16bit=True,
        max_seq_length=256,
        fast_inference=True,
        gpu_memory_utilization=0.25,
        max_lora_rank=64,
    )
    assert model.vllm_engine.options["model"] == str(folder)
    assert model.vllm_engine.options["gpu_memory_utilization"] == 0.25
    assert model.vllm_engine.options["max_model_len"] == 256
    assert model.vllm_engine.options["max_lora_rank"] == 64
    assert "quantization" not in model.vllm_engine.options
    assert model.fast_generate("this") == "answer to this"


def test_the_engine_serves_the_checkpoint_that_was_loaded(folder):
    model, _ = FastVisionModel.from_pretrained(folder, load_in_4bit=True, dtype="bf16")
    options = engine_options(model, 512, 0.25, "hf_secret")
    assert options == {
        "model": str(folder),
        "revision": None,
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "gpu_memory_utilization": 0.25,
        "enable_lora": True,
        "quantization": "bitsandbytes",
        "hf_token": "hf_secret",
    }
