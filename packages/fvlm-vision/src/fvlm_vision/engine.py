"""vLLM beside the model: an inference engine on the same checkpoint, for ``fast_inference=True``."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fvlm_core.errors import ConfigError, MissingExtraError
from fvlm_core.options import check_flag
from fvlm_core.origin import origin_of
from fvlm_vision.arguments import positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_DEFAULT_SHARE = 0.5  # from_pretrained's gpu_memory_utilization


def check_engine(fast_inference: bool, gpu_memory_utilization: float, max_lora_rank: int | None = None) -> None:
    """Check what an engine needs before anything large is loaded.

    What is said about an engine that is not asked for is warned of and not refused: programs that switch
    ``fast_inference`` on and off keep it beside.

    Raises:
        ConfigError: ``gpu_memory_utilization`` is no share of the memory, or ``max_lora_rank`` no rank.
        MissingExtraError: ``fast_inference`` without vLLM.
    """
    number = isinstance(gpu_memory_utilization, int | float) and not isinstance(gpu_memory_utilization, bool)
    if not number or not 0 < gpu_memory_utilization <= 1:
        raise ConfigError(
            f"gpu_memory_utilization={gpu_memory_utilization!r} is not a share of the GPU's memory: "
            "pass a number above 0 and up to 1."
        )
    check_flag("fast_inference", fast_inference)
    positive("max_lora_rank", max_lora_rank)
    if not fast_inference:
        given = (
            ("gpu_memory_utilization", gpu_memory_utilization, _DEFAULT_SHARE),
            ("max_lora_rank", max_lora_rank, None),
        )
        for name, value, default in given:
            if value != default:
                logger.warning("%s=%s does nothing without fast_inference=True.", name, value)
    elif find_spec("vllm") is None:
        raise MissingExtraError(
            "fast_inference=True needs vLLM, which is not installed: pip install fvlm-vision[vllm], "
            "or leave fast_inference out."
        )


def engine_options(
    model: PreTrainedModel,
    max_seq_length: int,
    gpu_memory_utilization: float,
    token: str | bool | None,
    max_lora_rank: int | None = None,
) -> dict[str, Any]:
    """What `vllm.LLM` is given to serve the checkpoint that a model was loaded from, with LoRA adapters allowed.

    Raises:
        ConfigError: the model was not loaded by `fvlm_core.load.load_model`.
    """
    origin = origin_of(model)
    if origin is None:
        raise ConfigError("The model has no origin: load it with from_pretrained.")
    options: dict[str, Any] = {
        "model": origin.source,
        "revision": origin.revision,
        "trust_remote_code": origin.trust_remote_code,
        "dtype": origin.dtype,
        "max_model_len": max_seq_length,
        "gpu_memory_utilization": gpu_memory_utilization,
        "enable_lora": True,
    }
    if origin.precision.quantized:  # vLLM quantizes to 4 bit as it loads, and reads stored bitsandbytes weights
        options["quantization"] = "bitsandbytes"
    if max_lora_rank is not None:  # vLLM's own default is 16
        options["max_lora_rank"] = max_lora_rank
    if token is not None:
        options["hf_token"] = token
    return options


def attach_engine(model: Any, options: dict[str, Any]) -> None:
    """Start an engine and bind it: ``model.vllm_engine`` (a `vllm.LLM`) and ``model.fast_generate`` (its ``generate``).

    The engine holds weights of its own. An adapter reaches it as vLLM takes them: ``lora_request=`` on a saved adapter.
    """
    from vllm import LLM

    engine = LLM(**options)
    vars(model)["vllm_engine"] = engine
    vars(model)["fast_generate"] = engine.generate
