"""Feed-forward layers, gated or not, as one autograd function with their adapters."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from fvlm_core.fused.adapted import is_decoding, together
from fvlm_core.passes import result_is_unread
from fvlm_kernels import lora_decode, lora_decode_gated, lora_mlp
from fvlm_kernels.lora_decode import Gate
from fvlm_kernels.lora_mlp import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "QuickGELUActivation": "quick_gelu",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}
_ACTIVATION_NAMES = ("act_fn", "act", "activation_fn")
_PLAIN_NAMES = (("fc1", "fc2"), ("linear_fc1", "linear_fc2"), ("linear_1", "linear_2"))


def activation_of(module: nn.Module) -> Activation | None:
    """Return the kernels' name of an activation module, or None for one that they do not have."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module).__name__)


def _act(module: nn.Module) -> nn.Module:
    return next(cast("nn.Module", module._modules[name]) for name in _ACTIVATION_NAMES if name in module._modules)


def gated_unfit(module: nn.Module) -> str | None:
    """Say why a gated MLP cannot be fused, or None."""
    act = _act(module)
    known = activation_of(act)
    return None if known not in (None, "quick_gelu") else f"has the activation {type(act).__name__}"


def plain_unfit(module: nn.Module) -> str | None:
    """Say why a plain MLP cannot be fused, or None."""
    act = _act(module)
    known = activation_of(act)
    return None if known not in (None, "silu") else f"has the activation {type(act).__name__}"


def gated_forward(module: Any, x: Tensor) -> Tensor:
    """``down(act(gate(x)) · up(x))`` on ``(..., hidden)``."""
    act = _act(module)
    fused = _fused(x, module, (module.gate_proj, module.up_proj, module.down_proj), act)
    if fused is not None:
        return fused
    return cast("Tensor", module.down_proj(act(module.gate_proj(x)) * module.up_proj(x)))


def plain_forward(module: Any, x: Tensor) -> Tensor:
    """``fc2(act(fc1(x)))`` on ``(..., hidden)``."""
    act = _act(module)
    first, second = next((getattr(module, a), getattr(module, b)) for a, b in _PLAIN_NAMES if a in module._modules)
    fused = _fused(x, module, (first, second), act)
    return cast("Tensor", second(act(first(x)))) if fused is None else fused


def merging_projector_forward(module: Any, image_features: Tensor, image_sizes: Tensor) -> Tensor:
    """Carry ``(patches, width)`` of all images into the language model as Mistral 3 does: norm, merging, MLP."""
    return plain_forward(module, module.patch_merger(module.norm(image_features), image_sizes))


def _fused(x: Tensor, module: nn.Module, linears: tuple[nn.Module, ...], act: nn.Module) -> Tensor | None:
    name = activation_of(act)
    found = None if name is None else together(linears)
    if name is None or found is None:
        return None
    (gate, *up, down), compute_dtype = found
    if is_decoding(x) and not module.training:
        if up:
            gated = cast("Gate", name)  # `gated_unfit` lets no other activation come here
            hidden = lora_decode_gated(x, gate, up[0], gated, compute_dtype=compute_dtype)
        else:
            hidden = act(lora_decode(x, (gate,), compute_dtype=compute_dtype)[0])
        return lora_decode(hidden, (down,), compute_dtype=compute_dtype)[0]
    return lora_mlp(
        x,
        gate,
        up[0] if up else None,
        down,
        activation=name,
        training=module.training,
        compute_dtype=compute_dtype,
        unread=result_is_unread(),
    )
