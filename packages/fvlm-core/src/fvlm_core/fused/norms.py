"""Norms by one kernel, alone or together with the residual addition in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fvlm_core.fused.kinds import kind_of
from fvlm_kernels import layer_norm, rms_norm


def rms_norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """Normalize ``(..., hidden)`` as Llama's and Qwen's RMS norms do, with their rounding."""
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def gemma_rms_norm_forward(module: Any, x: Tensor) -> Tensor:
    """Normalize ``(..., hidden)`` as Gemma 3 does: weights around zero, rounding after they are applied."""
    return rms_norm(x, module.weight, module.eps, offset=1.0, rounding="gemma")


def normalized(norm: Any, x: Tensor) -> Tensor:
    """Return the norm of x in the dtype in which linear layers read it.

    Under CUDA autocast stock layer norms return fp32, which the linear layers behind them round, each for itself; here
    it is rounded at once.
    """
    if type(norm) is nn.LayerNorm:
        return layer_norm(x, norm.weight, norm.bias, norm.eps, out_dtype=_read_as(x))
    normed: Tensor = norm(x)
    return normed


def add_and_normalize(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(norm(x + residual), x + residual)``, in one launch where the norm is one that is known here."""
    if x.dtype == residual.dtype:
        if type(norm) is nn.LayerNorm:
            return layer_norm(x, norm.weight, norm.bias, norm.eps, residual=residual, out_dtype=_read_as(x))
        kind = kind_of(norm)
        if kind == "rms_norm":
            return rms_norm(x, norm.weight, norm.variance_epsilon, residual=residual)
        if kind == "gemma_rms_norm":
            return rms_norm(x, norm.weight, norm.eps, offset=1.0, rounding="gemma", residual=residual)
    total = residual + x
    return normalized(norm, total), total


def _read_as(x: Tensor) -> torch.dtype:
    """Return autocast's dtype for what it rounds in front of a linear layer, which is what is in fp32."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
