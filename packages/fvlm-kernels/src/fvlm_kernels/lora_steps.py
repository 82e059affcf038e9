"""Forward and backward of several adapted linear layers that share their input, without autograd.

The autograd functions of :mod:`.lora` and :mod:`.lora_mlp` are made of these two steps. Here ``x`` is ``(rows, in)``,
every layer is given as its settings and its flat tensors (:mod:`.lora_layer`), and nothing is checked.

The base weights are dequantized one at a time and let go after their product, so that one of them is in memory at any
moment; the allocator hands the same bytes to the next. Without dropout the A matrices of all layers are stacked, and
one product serves them all, in forward and in each part of backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .int8 import dequantize_rows
from .lora_layer import Dtypes, Settings, Slots
from .nf4 import dequantize_parts

BIAS, A, B = 5, 6, 7
"""Where a layer's slots hold what is not the base."""

Layers = Sequence[tuple[Settings, Slots]]


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


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    """Narrow a slot that is known to be filled."""
    if tensor is None:
        raise TypeError("lora: a slot that must hold a tensor is empty")
    return tensor


def base_weight(settings: Settings, slots: Slots, dtype: torch.dtype, triton: bool) -> torch.Tensor:
    """Return W of a layer in ``dtype``: the weight itself where it has that dtype already."""
    first = _given(slots[0])
    if settings.kind == "plain":
        return first.to(dtype)
    second = _given(slots[1])
    if settings.kind == "int8":
        return dequantize_rows(first, second, dtype, triton=triton)
    parts = first, second, slots[2], slots[3], slots[4]
    return dequantize_parts(parts, settings.blocksize, settings.shape, dtype, triton=triton)


def _ranks(layers: Layers) -> list[slice]:
    """Return where each layer's rows lie in the stacked A matrices; an empty slice for a layer without an adapter."""
    slices, start = [], 0
    for _, slots in layers:
        a = slots[A]
        stop = start + (0 if a is None else a.shape[0])
        slices.append(slice(start, stop))
        start = stop
    return slices


def _stacked(layers: Layers, dtype: torch.dtype) -> torch.Tensor:
    """Return all A matrices one above the other, in ``dtype``."""
    matrices = [slots[A] for _, slots in layers]
    cast = [a.to(dtype) for a in matrices if a is not None]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def _keep_scale(p: float) -> float:
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def _dropped(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """Return dropout(x) of a saved mask; applied to a gradient it is dropout's backward."""
    return torch.ops.aten.native_dropout_backward.default(x, mask, _keep_scale(p))  # type: ignore[no-any-return]


def adapted(layers: Layers) -> bool:
    """Whether any of the layers has an adapter."""
    return any(slots[A] is not None for _, slots in layers)


def _plus_product(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return y + scale · left right, in y's own memory where nobody traces."""
    if torch.compiler.is_compiling():  # Dynamo loses the gradient of an output that its Function changed in place
        return torch.addmm(y, left, right, alpha=scale)
    return y.addmm_(left, right, alpha=scale)


def forward(
    x: torch.Tensor, layers: Layers, dtypes: Dtypes, dropout: bool, triton: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor | None]]:
    """Apply every layer to ``x``.

    Args:
        x: ``(rows, in_features)``.
        layers: the layers, all of ``in_features`` columns.
        dtypes: what to compute in.
        dropout: whether to drop inputs of the adapters; then each adapter has a mask of its own, as in PEFT.
        triton: whether quantized weights are dequantized by kernels.

    Returns:
        the outputs ``(rows, out_features)``; the products of x with the stacked A, ``(rows, Σr)`` (``None`` without any
        adapter); and for each layer the mask of what dropout kept.
    """
    wide = x.to(dtypes.base)
    outputs = []
    for settings, slots in layers:
        bias = slots[BIAS]
        weight = base_weight(settings, slots, dtypes.base, triton)
        y = torch.nn.functional.linear(wide, weight, None if bias is None else bias.to(dtypes.base))
        outputs.append(y.to(dtypes.out))
    masks: list[torch.Tensor | None] = [None] * len(layers)
    if not adapted(layers):
        return outputs, None, masks
    narrow, ranks = x.to(dtypes.lora), _ranks(layers)
    if dropout:
        products, masks = _dropout_products(narrow, layers)
    else:
        products = narrow @ _stacked(layers, dtypes.lora).t()
    for i, (settings, slots) in enumerate(layers):
        if slots[B] is None:
            continue
        part, b = products[:, ranks[i]], _given(slots[B]).to(dtypes.lora)
        if dtypes.out == dtypes.lora:
            outputs[i] = _plus_product(outputs[i], part, b.t(), settings.scaling)
        else:
            outputs[i] = (outputs[i] + (part @ b.t()) * settings.scaling).to(dtypes.out)
    return outputs, products, masks


def _dropout_products(x: torch.Tensor, layers: Layers) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the products with A of differently dropped inputs, side by side, and the masks."""
    products: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    for settings, slots in layers:
        a, mask, kept = slots[A], None, x
        if a is not None:
            if settings.dropout:
                kept, mask = torch.native_dropout(x, settings.dropout, True)
            products.append(kept @ a.to(x.dtype).t())
        masks.append(mask)
    return torch.cat(products, dim=1), masks


class Saved(NamedTuple):
    """What backward reads of the forward pass; a field that no gradient asked for needs is ``None``."""

    x: torch.Tensor | None
    """``(rows, in_features)``, the input as it came: for the gradients of A"""
    products: torch.Tensor | None
    """``(rows, Σr)``, what :func:`forward` returned: for the gradients of B"""
    masks: Sequence[torch.Tensor | None]
    """for each layer, what its dropout kept"""


def input_products(x: torch.Tensor, layers: Layers, dtypes: Dtypes) -> torch.Tensor | None:
    """Return the products of ``x`` with the stacked A, ``(rows, Σr)``: those of :func:`forward` without dropout."""
    return x.to(dtypes.lora) @ _stacked(layers, dtypes.lora).t() if adapted(layers) else None


def backward(
    grads: Sequence[torch.Tensor],
    saved: Saved,
    layers: Layers,
    dtypes: Dtypes,
    needs: Sequence[Needs],
    need_dx: bool,
    triton: bool,
) -> tuple[torch.Tensor | None, list[Gradients]]:
    """Differentiate :func:`forward`; see :mod:`.lora` for the formulas.

    Args:
        grads: the gradient of each output, ``(rows, out_features)``.
        saved: what the forward pass kept.
        layers, dtypes, triton: as in :func:`forward`.
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
    biases = [dy.sum(0).to(_given(slots[BIAS]).dtype) if need.bias else None for (_, slots), dy, need in pairs]
    if not adapted(layers):
        return [Gradients(bias) for bias in biases], None
    cast = [dy.to(dtypes.lora) for dy in grads]
    second = _gradients_of_b(cast, saved.products, layers, needs)
    need_a = any(need.a for need in needs)
    inner = _inner(cast, layers, dtypes) if need_inner or need_a else None
    first = _gradients_of_a(_given(inner), saved, layers, dtypes, needs) if need_a else [None] * len(layers)
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
    dx: torch.Tensor | None = None
    for (settings, slots), dy in zip(layers, grads, strict=True):
        wide, weight = dy.to(dtypes.base), base_weight(settings, slots, dtypes.base, triton)
        dx = wide @ weight if dx is None else dx.addmm_(wide, weight)
    total = _given(dx)
    if inner is None:
        return total
    if all(mask is None for mask in masks):
        return _add(total, inner, _stacked(layers, dtypes.lora))
    for (settings, slots), rank, mask in zip(layers, _ranks(layers), masks, strict=True):
        if slots[A] is not None:
            through = inner[:, rank] @ _given(slots[A]).to(dtypes.lora)
            total = total + (through if mask is None else _dropped(through, mask, settings.dropout))
    return total


def _gradients_of_b(
    grads: Sequence[torch.Tensor], products: torch.Tensor | None, layers: Layers, needs: Sequence[Needs]
) -> list[torch.Tensor | None]:
    """Return dB = s · dyᵀ (x Aᵀ) of each layer that asks for it."""
    made: list[torch.Tensor | None] = []
    for (settings, slots), dy, need, rank in zip(layers, grads, needs, _ranks(layers), strict=True):
        if not need.b:
            made.append(None)
            continue
        b = _given(slots[B])
        db = dy.new_empty(b.shape).addmm_(dy.t(), _given(products)[:, rank], beta=0, alpha=settings.scaling)
        made.append(db.to(b.dtype))
    return made


def _inner(grads: Sequence[torch.Tensor], layers: Layers, dtypes: Dtypes) -> torch.Tensor:
    """Return the gradients of all adapters' inner products side by side, s · dy B: ``(rows, Σr)``."""
    ranks = _ranks(layers)
    inner = grads[0].new_empty(grads[0].shape[0], ranks[-1].stop)
    for (settings, slots), dy, rank in zip(layers, grads, ranks, strict=True):
        if slots[B] is not None:
            b = _given(slots[B]).to(dtypes.lora)
            inner[:, rank].addmm_(dy, b, beta=0, alpha=settings.scaling)
    return inner


def _add(dx: torch.Tensor, inner: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return dx + inner a; in place where the dtypes allow it."""
    return dx.addmm_(inner, a) if dx.dtype == inner.dtype else dx + inner @ a


def _gradients_of_a(
    inner: torch.Tensor, saved: Saved, layers: Layers, dtypes: Dtypes, needs: Sequence[Needs]
) -> list[torch.Tensor | None]:
    """Return dA = zᵀ drop(x) of each layer that asks for it: in one product where all adapters read the same input."""
    x, ranks = _given(saved.x).to(dtypes.lora), _ranks(layers)
    shared = inner.t() @ x if all(mask is None for mask in saved.masks) else None
    made: list[torch.Tensor | None] = []
    for (settings, slots), need, rank, mask in zip(layers, needs, ranks, saved.masks, strict=True):
        if not need.a:
            made.append(None)
        elif shared is not None:
            made.append(shared[rank].to(_given(slots[A]).dtype))
        else:
            kept = x if mask is None else _dropped(x, mask, settings.dropout)
            made.append((inner[:, rank].t() @ kept).to(_given(slots[A]).dtype))
    return made
