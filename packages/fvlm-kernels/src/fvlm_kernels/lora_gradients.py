"""Backward pass of several adapted linear layers that share their input, without autograd; see :mod:`.lora_steps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .lora_layer import Dtypes
from .lora_steps import BIAS, A, B, Layers, adapted, base_weight, dropped_by, given, ranks_of, stacked


class Needs(NamedTuple):
    """Which gradients of a layer are asked for."""

    bias: bool
    a: bool
    b: bool


class Gradients(NamedTuple):
    """The gradients of one layer's bias, A and B; ``None`` where none was asked for."""

    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


class Saved(NamedTuple):
    """What backward reads of the forward pass; a field that no gradient asked for needs is ``None``."""

    x: torch.Tensor | None
    """``(rows, in_features)``, the input as it came: for the gradients of A"""
    products: torch.Tensor | None
    """``(rows, Σr)``, what :func:`.lora_steps.forward` returned: for the gradients of B"""
    masks: Sequence[torch.Tensor | None]
    """for each layer, what its dropout kept"""


def backward(
    grads: Sequence[torch.Tensor],
    saved: Saved,
    layers: Layers,
    dtypes: Dtypes,
    needs: Sequence[Needs],
    need_dx: bool,
    triton: bool,
) -> tuple[torch.Tensor | None, list[Gradients]]:
    """Differentiate :func:`.lora_steps.forward`; see :mod:`.lora` for the formulas.

    Args:
        grads: the gradient of each output, ``(rows, out_features)``.
        saved: what the forward pass kept.
        layers, dtypes, triton: as in :func:`.lora_steps.forward`.
        needs: for each layer, which of its gradients are asked for.
        need_dx: whether the input's gradient is.

    Returns:
        the input's gradient, in ``dtypes.base`` or the wider of that and ``dtypes.lora``; and each layer's gradients,
        in the dtypes of what they belong to.
    """
    made, inner = parameter_gradients(grads, saved, layers, dtypes, needs, need_dx)
    dx = input_gradient(grads, inner, saved.masks, layers, dtypes, triton) if need_dx else None
    return dx, made


def parameter_gradients(
    grads: Sequence[torch.Tensor],
    saved: Saved,
    layers: Layers,
    dtypes: Dtypes,
    needs: Sequence[Needs],
    need_inner: bool,
) -> tuple[list[Gradients], torch.Tensor | None]:
    """Return each layer's gradients, and those of the adapters' inner products, which :func:`input_gradient` takes.

    It is a step of its own so that a caller can let the input go before the input's gradient takes its place. With
    ``need_inner`` the inner products' gradients are made even where no A asks for them.
    """
    pairs = list(zip(layers, grads, needs, strict=True))
    biases = [dy.sum(0).to(given(slots[BIAS]).dtype) if need.bias else None for (_, slots), dy, need in pairs]
    if not adapted(layers):
        return [Gradients(bias) for bias in biases], None
    cast = [dy.to(dtypes.lora) for dy in grads]
    second = _gradients_of_b(cast, saved.products, layers, needs)
    need_a = any(need.a for need in needs)
    inner = _inner(cast, layers, dtypes) if need_inner or need_a else None
    first = _gradients_of_a(given(inner), saved, layers, dtypes, needs) if need_a else [None] * len(layers)
    return [Gradients(*g) for g in zip(biases, first, second, strict=True)], inner


def input_gradient(
    grads: Sequence[torch.Tensor],
    inner: torch.Tensor | None,
    masks: Sequence[torch.Tensor | None],
    layers: Layers,
    dtypes: Dtypes,
    triton: bool,
) -> torch.Tensor:
    """Return dx of :func:`backward`, given what :func:`parameter_gradients` returned and the masks of dropout."""
    dropped = any(mask is not None for mask in masks)
    dx: torch.Tensor | None = None
    if inner is not None and not dropped and dtypes.base == dtypes.lora:
        dx, inner = inner @ stacked(layers, dtypes.lora), None  # first, for the reason that `lora_steps` gives
    for (settings, slots), dy in zip(layers, grads, strict=True):
        wide, weight = dy.to(dtypes.base), base_weight(settings, slots, dtypes.base, triton)
        dx = wide @ weight if dx is None else dx.addmm_(wide, weight)
    total = given(dx)
    if inner is None:
        return total
    if not dropped:
        return total + inner @ stacked(layers, dtypes.lora)
    for (settings, slots), rank, mask in zip(layers, ranks_of(layers), masks, strict=True):
        if slots[A] is not None:
            through = inner[:, rank] @ given(slots[A]).to(dtypes.lora)
            total = total + (through if mask is None else dropped_by(through, mask, settings.dropout))
    return total


def _gradients_of_b(
    grads: Sequence[torch.Tensor], products: torch.Tensor | None, layers: Layers, needs: Sequence[Needs]
) -> list[torch.Tensor | None]:
    """Return dB = s · dyᵀ (x Aᵀ) of each layer that asks for it."""
    made: list[torch.Tensor | None] = []
    for (settings, slots), dy, need, rank in zip(layers, grads, needs, ranks_of(layers), strict=True):
        if not need.b:
            made.append(None)
            continue
        b = given(slots[B])
        db = dy.new_empty(b.shape).addmm_(dy.t(), given(products)[:, rank], beta=0, alpha=settings.scaling)
        made.append(db.to(b.dtype))
    return made


def _inner(grads: Sequence[torch.Tensor], layers: Layers, dtypes: Dtypes) -> torch.Tensor:
    """Return the gradients of all adapters' inner products side by side, s · dy B: ``(rows, Σr)``."""
    ranks = ranks_of(layers)
    inner = grads[0].new_empty(grads[0].shape[0], ranks[-1].stop)
    for (settings, slots), dy, rank in zip(layers, grads, ranks, strict=True):
        if slots[B] is not None:
            b = given(slots[B]).to(dtypes.lora)
            inner[:, rank].addmm_(dy, b, beta=0, alpha=settings.scaling)
    return inner


def _gradients_of_a(
    inner: torch.Tensor, saved: Saved, layers: Layers, dtypes: Dtypes, needs: Sequence[Needs]
) -> list[torch.Tensor | None]:
    """Return dA = zᵀ drop(x) of each layer that asks for it: in one product where all adapters read the same input."""
    x, ranks = given(saved.x).to(dtypes.lora), ranks_of(layers)
    shared = inner.t() @ x if all(mask is None for mask in saved.masks) else None
    made: list[torch.Tensor | None] = []
    for (settings, slots), need, rank, mask in zip(layers, needs, ranks, saved.masks, strict=True):
        if not need.a:
            made.append(None)
        elif shared is not None:
            made.append(shared[rank].to(given(slots[A]).dtype))
        else:
            kept = x if mask is None else dropped_by(x, mask, settings.dropout)
            made.append((inner[:, rank].t() @ kept).to(given(slots[A]).dtype))
    return made
