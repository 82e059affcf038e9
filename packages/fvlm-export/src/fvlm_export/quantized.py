"""bitsandbytes tensors as they are stored: back to floating point, and from floating point to NF4.

A quantized linear layer's ``weight`` lies in a checkpoint as packed bytes with companions: ``weight.absmax``,
``weight.quant_map``, ``weight.nested_absmax``, ``weight.nested_quant_map`` and ``weight.quant_state.bitsandbytes__nf4``
for 4 bit (QLoRA, https://arxiv.org/abs/2305.14314), ``SCB`` and ``weight_format`` for int8 (LLM.int8(),
https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fvlm_core.errors import CheckpointError
from fvlm_export.safetensor_file import TensorInfo

if TYPE_CHECKING:
    from torch import nn

_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_BLOCK, _NESTED_BLOCK = 64, 256
_STATE_BYTES = 256  # the packed JSON is padded to this, so that a shard's header is known before its tensors


def companions(names: Iterable[str]) -> dict[str, list[str]]:
    """Group a checkpoint's quantized weights with the tensors that belong to them.

    Args:
        names: every tensor name of the checkpoint.

    Returns:
        Quantized weight → the names of its companions; empty for a checkpoint that is not quantized.
    """
    held = set(names)
    found: dict[str, list[str]] = {}
    for name in held:
        weight, state, _ = name.partition(_STATE)
        if state and weight in held:
            found[weight] = [name, *(weight + end for end in _COMPANIONS if weight + end in held)]
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            found[f"{module}.weight"] = [name, *(n for n in (f"{module}.weight_format",) if n in held)]
    return found


def state_name(names: Iterable[str]) -> str | None:
    """Return which of a weight's companions holds the quantization state; None for int8, which has none."""
    return next((name for name in names if _STATE in name), None)


def dequantized_info(weight: TensorInfo, state: torch.Tensor | None, default: torch.dtype) -> TensorInfo:
    """Return a quantized weight's dtype and shape as floating point.

    Args:
        weight: the packed tensor.
        state: the quantization state, as packed bytes; None: int8.
        default: int8 records no dtype; this one is used.

    Raises:
        CheckpointError: the quantization state cannot be read.
    """
    if state is None:
        return TensorInfo(weight.name, default, weight.shape)
    try:
        facts = json.loads(bytes(state.numpy()))
        return TensorInfo(weight.name, getattr(torch, facts["dtype"]), tuple(facts["shape"]))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"the quantization state of {weight.name!r} cannot be read; get the file again."
        ) from error


def dequantize(weight: torch.Tensor, parts: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the floating-point values of a stored weight, in the dtype that bitsandbytes computes them in."""
    from bitsandbytes import functional

    scales = next((value for name, value in parts.items() if name.endswith(".SCB")), None)
    if scales is not None:
        value: torch.Tensor = functional.int8_vectorwise_dequant(weight.to(device), scales.to(device))
        return value
    named = {name[name.index(".weight.") + 1 :]: value.clone() for name, value in parts.items()}
    state = functional.QuantState.from_dict(named, device=device)
    return functional.dequantize_4bit(weight.to(device), state)


@dataclass(frozen=True)
class RoundTrip:
    """Weights as a quantized load holds them: quantized and dequantized.

    Attributes:
        bits: 4 (NF4 with double quantization) or 8.
        dtype: that the weights were loaded in, and that they are dequantized to.
        params: names of the parameters that are quantized.
    """

    bits: int
    dtype: torch.dtype
    params: frozenset[str]

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Return what is left of a weight, in :attr:`dtype`."""
        from bitsandbytes import functional

        if self.bits == 8:
            packed, scales, _ = functional.int8_vectorwise_quant(value.to(torch.float16))
            restored: torch.Tensor = functional.int8_vectorwise_dequant(packed, scales).to(self.dtype)
            return restored
        packed, state = functional.quantize_4bit(
            value.to(self.dtype).contiguous(), compress_statistics=True, quant_type="nf4"
        )
        return functional.dequantize_4bit(packed, state)


def is_quantized(module: nn.Module) -> bool:
    """Whether a live module's weight is held in 4 or 8 bit by bitsandbytes."""
    weight = module._parameters.get("weight")
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def live_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the floating dtype that a live quantized module stands for."""
    weight: Any = module.weight
    return weight.quant_state.dtype if type(weight).__name__ == "Params4bit" else default


def live_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape that a live quantized module stands for."""
    weight: Any = module.weight
    return tuple(weight.quant_state.shape if type(weight).__name__ == "Params4bit" else weight.shape)


def dequantize_live(module: nn.Module) -> torch.Tensor:
    """Return a live quantized module's weight in floating point: what its forward pass multiplies with."""
    from bitsandbytes import functional

    weight: Any = module.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    held: Any = module
    scales = weight.SCB if weight.SCB is not None else held.state.SCB  # the layer takes them over when it first runs
    value: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
    return value


def nf4_infos(weight: TensorInfo) -> list[TensorInfo]:
    """Return the tensors that a weight becomes in NF4 with double quantization."""
    blocks = -(-math.prod(weight.shape) // _BLOCK)
    name = weight.name
    return [
        TensorInfo(name, torch.uint8, (-(-math.prod(weight.shape) // 2), 1)),
        TensorInfo(f"{name}.absmax", torch.uint8, (blocks,)),
        TensorInfo(f"{name}.nested_absmax", torch.float32, (-(-blocks // _NESTED_BLOCK),)),
        TensorInfo(f"{name}.nested_quant_map", torch.float32, (256,)),
        TensorInfo(f"{name}.quant_map", torch.float32, (16,)),
        TensorInfo(f"{name}{_STATE}nf4", torch.uint8, (_STATE_BYTES,)),
    ]


def nf4_tensors(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize a weight to NF4 with double quantization.

    Args:
        name: the weight's name.
        value: the weight in floating point, on the device that shall do the work.

    Returns:
        The tensors of :func:`nf4_infos`, in their order, on the CPU.
    """
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(value.contiguous(), compress_statistics=True, quant_type="nf4")
    parts = state.as_dict(packed=True)
    facts = bytes(parts.pop(f"quant_state.bitsandbytes__{state.quant_type}").numpy())
    padded = torch.frombuffer(bytearray(facts.ljust(_STATE_BYTES)), dtype=torch.uint8)  # JSON ends in any blanks
    order = ("absmax", "nested_absmax", "nested_quant_map", "quant_map")
    tensors = {name: packed, **{f"{name}.{part}": parts[part] for part in order}, f"{name}{_STATE}nf4": padded}
    return {key: tensor.cpu() for key, tensor in tensors.items()}
