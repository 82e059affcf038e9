"""Scaled dot-product attention in two halves: its result with what its gradient needs, and that gradient later.

For gradient checkpointing that keeps the attention's result and computes the cheaper rest of a layer again: the second
pass puts the known result in its place, and the backward pass is the one that ``scaled_dot_product_attention`` has.

Maths: out = softmax(scale · Q Kᵀ) V and the logarithm of each row's sum, lse; with P = exp(scale · Q Kᵀ − lse) the
gradients are dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO ∘ out)), dQ = scale · dS K, dK = scale · dSᵀ Q (Dao et al.,
FlashAttention, 2022). The first half reads everything; the second only Q, K, V, out and lse.

Numerics and determinism are those of the PyTorch operator that ``scaled_dot_product_attention`` would choose for the
same inputs: cuDNN's or flash attention on a GPU, flash attention on a CPU. No kernel of our own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from ._launch import check_floating, check_same_device, check_same_dtype, check_shape
from ._library import first_derivative_only

MAX_HEAD_DIM = 128
"""Up to here no backend asks whether a gradient will be wanted before it takes a head size."""
_aten = torch.ops.aten


class AttentionResiduals(NamedTuple):
    """What :func:`attention_with_residuals` returns and :func:`attention_from_residuals` takes."""

    backend: str
    """``"cudnn"``, ``"flash"`` or ``"cpu"``"""
    out: torch.Tensor
    """``(B, H, S, D)``, the result"""
    logsumexp: torch.Tensor
    """``(B, H, S)`` or ``(B, H, S, 1)``, fp32"""


def _backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> str | None:
    """Return which operator PyTorch would take, or None for one without a known second half."""
    ragged = q.is_cuda and q.shape[-1] % 8  # PyTorch pads the channels of these before the operator
    if q.shape[-1] > MAX_HEAD_DIM or ragged or q.numel() == 0 or k.numel() == 0:
        return None
    chosen = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale)
    if q.device.type == "cpu":
        return "cpu" if chosen == SDPBackend.FLASH_ATTENTION.value else None
    names = {SDPBackend.CUDNN_ATTENTION.value: "cudnn", SDPBackend.FLASH_ATTENTION.value: "flash"}
    return names.get(chosen) if q.is_cuda else None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_floating("attention_with_residuals", q=q, k=k, v=v)
    check_same_dtype("attention_with_residuals", q=q, k=k, v=v)
    check_same_device("attention_with_residuals", q=q, k=k, v=v)
    if q.dim() != 4 or k.dim() != 4 or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        raise ValueError(
            f"attention_with_residuals: q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}; they must be "
            "(B, H, S, D) and (B, H, Skv, D)"
        )
    check_shape("attention_with_residuals", "v", v, k.shape)


def attention_with_residuals(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None
) -> AttentionResiduals | None:
    """Attend, without autograd, and return the result with what its gradient needs.

    Args:
        q: ``(B, H, S, D)``, floating.
        k: ``(B, H, Skv, D)``, same dtype.
        v: like ``k``.
        causal: whether a token sees only itself and what comes before it.
        scale: what the scores are multiplied by; ``None`` for 1 / √D.

    Returns:
        ``None`` where PyTorch would take an operator whose halves are not known here (its memory-efficient or plain
        form, D above 128, on a GPU no multiple of 8, nothing to attend to): then attend as usual.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype is not floating, or they differ.

    Example:
        >>> with torch.no_grad():
        ...     residuals = attention_with_residuals(q, k, v)
        >>> out = attention_from_residuals(q, k, v, residuals)  # later, with gradients
    """
    _check(q, k, v)
    backend = _backend(q, k, v, causal, scale)
    if backend is None:
        return None
    with torch.no_grad():
        if backend == "cudnn":
            out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        elif backend == "flash":
            out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        else:
            out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return AttentionResiduals(backend, out, lse)


class _Known(torch.autograd.Function):
    """The known result in the forward pass, the attention's gradients in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        backend: str,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = backend, causal, scale
        return out.view_as(out)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        backend, causal, scale = ctx.rest
        lengths = q.shape[2], k.shape[2]
        if backend == "cpu":
            step = _aten._scaled_dot_product_flash_attention_for_cpu_backward
            grads = step(dy, q, k, v, out, lse, 0.0, causal, scale=scale)
        else:
            rest: tuple[Any, ...]
            unused = lse.new_empty((), dtype=torch.int64)  # the state of the random numbers of dropout
            if backend == "cudnn":
                step = _aten._scaled_dot_product_cudnn_attention_backward
                rest = unused, unused, None, None, None, *lengths, 0.0, causal
            else:
                step = _aten._scaled_dot_product_flash_attention_backward
                rest = None, None, *lengths, 0.0, causal, unused, unused
            grads = step(dy, q, k, v, out, lse, *rest, scale=scale)
        return *grads, None, None, None, None, None


def attention_from_residuals(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    residuals: AttentionResiduals,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the known result of attending, with its gradients for ``q``, ``k`` and ``v``.

    Args:
        q: as it was given to :func:`attention_with_residuals`, as are the following.
        k: ``(B, H, Skv, D)``.
        v: like ``k``.
        residuals: what that returned; its tensors may have been copied.
        causal: as it was given then.
        scale: as it was given then.

    Returns:
        ``(B, H, S, D)``: ``residuals.out``, whose memory it shares.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype is not floating, or they differ.
    """
    _check(q, k, v)
    check_shape("attention_from_residuals", "residuals.out", residuals.out, q.shape)
    out: torch.Tensor = _Known.apply(q, k, v, *residuals, causal, scale)
    return out
