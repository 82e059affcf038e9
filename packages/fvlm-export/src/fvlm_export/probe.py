"""The last proof, when the trained model is at hand: the folder, loaded by stock transformers, answers as it does.

One image and one line of text go through both. What may differ depends on what was merged onto: nothing but rounding
where the output holds what training saw; where the adapter was trained over 4- or 8-bit weights and merged onto the
16-bit original, or where the output is 4-bit, the answers differ by design, and the difference is recorded without a
limit.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fvlm_core.errors import ExportError
from fvlm_export.adapters import active_adapters
from fvlm_export.live import LiveModel

logger = logging.getLogger(__name__)

# Of the largest logit. fp32: the order of additions. 16 bit: merged weights are rounded once more than the adapter's
# own path, and every layer rounds its output; int8 also quantizes activations, which the reloaded model does not.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
_INT8_LIMIT = 0.3
_PROMPT = "Describe this image."


@torch.no_grad()
def probe(
    folder: Path, live: LiveModel, processor: Any, *, weights: Mapping[str, float], exact: bool, trust: bool
) -> dict[str, Any]:
    """Compare the written folder's logits with the live model's.

    Args:
        folder: the finished folder.
        live: the model it was made from.
        processor: of the model; None: the one in the folder.
        weights: the adapters that were merged, with their weights.
        exact: whether the output holds the weights that the live model computes with.
        trust: whether the folder's own model code may run.

    Returns:
        ``{"error": …, "limit": …}``, relative to the largest logit, or ``{"skipped": reason}``.

    Raises:
        ExportError: the folder does not load, or its answers are off.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    device = _room(live.base.device, size)
    if device is None:
        return {"skipped": f"no memory for a second model of {size / 1e9:.1f} GB"}
    inputs = _inputs(folder, processor, trust)
    if inputs is None:
        return {"skipped": "there is no processor to make an input with"}
    if weights and set(weights) != set(active_adapters(live.outer)):
        return {"skipped": "other adapters were merged than the model has active"}
    with _weighed(live.outer, weights):
        expected = _logits(live.outer, inputs, live.base.device)
    reloaded = _load(folder, device, trust)
    found = _logits(reloaded, inputs, device)
    limit = _limit(live, reloaded.dtype) if exact else None
    del reloaded
    if device.type == "cuda":
        gc.collect()  # the model may sit in a cycle, and its memory is wanted for training on
    largest = float(expected.abs().max())
    error = float((found - expected).abs().max()) / largest
    if error != error:
        raise ExportError("the reloaded folder or the live model answers with NaN; nothing was left behind.")
    if limit is not None and error > limit:
        raise ExportError(
            f"the reloaded folder's logits are off by {error:.3g} of the largest, more than {limit:g}; nothing was "
            "left behind, please report it."
        )
    return {"error": error, "limit": limit, "image": "pixel_values" in inputs, "device": str(device)}


def _limit(live: LiveModel, written: torch.dtype) -> float:
    """The coarser of what the live model computes in and what was written decides."""
    if live.quantized and not live.four_bit:
        return _INT8_LIMIT
    return max(LIMITS.get(dtype, max(LIMITS.values())) for dtype in (live.base.dtype, written))


def _room(device: torch.device, size: int) -> torch.device | None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 1.3 * size + (1 << 30):
        return device
    return torch.device("cpu") if _free_host_memory() > 1.3 * size + (1 << 28) else None


def _free_host_memory() -> int:
    for line in (
        Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if Path("/proc/meminfo").exists() else ()
    ):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _inputs(folder: Path, processor: Any, trust: bool) -> dict[str, torch.Tensor] | None:
    from transformers import AutoProcessor

    if processor is None:
        try:
            processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=trust)
        except (OSError, ValueError):
            return None
    tokenizer = processor.tokenizer if hasattr(processor, "tokenizer") else processor
    if processor is tokenizer or processor.chat_template is None:
        return dict(tokenizer(_PROMPT, return_tensors="pt"))
    content = [{"type": "image", "image": _image()}, {"type": "text", "text": _PROMPT}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def _image() -> Any:
    from PIL import Image

    return Image.linear_gradient("L").resize((224, 168)).convert("RGB")


def _load(folder: Path, device: torch.device, trust: bool) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype="auto", device_map={"": device}, trust_remote_code=trust
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"the written folder does not load in transformers ({line}); nothing was left behind."
        ) from error


def _logits(model: Any, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    placed = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in inputs.items()
    }
    with _evaluating(model):
        return model(**placed).logits.float().cpu()  # type: ignore[no-any-return]


@contextmanager
def _weighed(model: torch.nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Have a model's adapters count as much as they did in the merge, and put their scalings back."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({n: layer.scaling[n] * w for n, w in weights.items() if n in layer.scaling})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
