"""A few rows through adapted linear layers that share their input, straight from NF4 codes: the products of decoding.

Maths, for one to eight rows of x and each of up to three layers (:mod:`.lora_layer`)::

    t = x Aᵀ,      y = x Wᵀ + bias + scaling · t Bᵀ

with W decoded as in :mod:`.nf4_matvec`. There is no gradient and no dropout: this is for decoding.

Numerics. x is read in the dtypes that PEFT would compute in (:func:`.lora_layer.dtypes_for`), and A is rounded to that
of the adapter as it is read; all sums are in fp32, W and t are never rounded, and y is rounded once. The order of every
sum depends on the weight's shape alone: two runs give the same bits, and a row does not depend on the others.

A step of decoding is bound by how many launches it takes, so there are two for all layers together: one for t of all of
them, one for their products, in which a program works on a few rows of one weight and adds bias and adapter at its end.
Parameters are read where they lie: a recording of these launches sees what training changes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch

from ._decode_products import MAX_LAYERS, MAX_ROWS, products_op
from ._launch import Impl, check_floating, check_same_device, rows_of, use_triton, without_autocast
from .gated import geglu, swiglu
from .lora_layer import Dtypes, LoRALinear, dtypes_for
from .lora_steps import forward
from .nf4 import words_of
from .nf4_format import NF4Weight

Gate = Literal["silu", "gelu", "gelu_tanh"]
_KERNEL_NAMES = {"silu": "silu", "gelu": "gelu_erf", "gelu_tanh": "gelu_tanh"}
_GATES: dict[str, Callable[..., torch.Tensor]] = {
    "silu": swiglu,
    "gelu": partial(geglu, approximate="none"),
    "gelu_tanh": geglu,
}


class _Group(NamedTuple):
    """What layers have in common that one launch computes."""

    blocksize: int
    nested: bool
    biased: bool
    rank: int
    dtypes: tuple[torch.dtype | None, ...]


def _group(layer: LoRALinear) -> _Group | None:
    """Return what a layer must share with others to be computed with them; None: the kernels do not take it."""
    base = layer.base
    if not isinstance(base, NF4Weight) or base.shape[1] % 8:
        return None
    if not torch.compiler.is_compiling() and words_of(base.packed)[1] != 8:  # a graph knows no addresses
        return None
    rank = 0 if layer.a is None else layer.a.shape[0]
    bias, b = layer.bias, layer.b
    dtypes = (None if bias is None else bias.dtype, None if b is None else b.dtype, base.absmax.dtype)
    return _Group(base.blocksize, base.nested_absmax is not None, bias is not None, rank, dtypes)


class _Call(NamedTuple):
    """How layers are applied: the dtypes that were asked for, and whether by kernels."""

    compute_dtype: torch.dtype | None
    lora_dtype: torch.dtype | None
    triton: bool

    def dtypes(self, rows: torch.Tensor, layers: Sequence[LoRALinear]) -> Dtypes:
        """Return what to compute in."""
        chosen = next((layer for layer in layers if layer.a is not None), layers[0])
        return dtypes_for(rows, chosen, self.compute_dtype, self.lora_dtype)


def _share_a_launch(layers: Sequence[LoRALinear], call: _Call) -> bool:
    groups = {_group(layer) for layer in layers} if call.triton else {None}
    return len(groups) == 1 and None not in groups and len(layers) <= MAX_LAYERS


def _launch(rows: torch.Tensor, layers: Sequence[LoRALinear], call: _Call, act: str = "") -> torch.Tensor:
    dtypes = call.dtypes(rows, layers)
    y: torch.Tensor = products_op(
        rows.to(dtypes.base),
        rows.to(dtypes.lora),
        [tensor for layer in layers for tensor in layer.slots],
        [float(layer.scaling) for layer in layers],
        [layer.base.shape[0] for layer in layers],
        layers[0].settings.blocksize,
        dtypes.out,
        act,
    )
    return y


def _apply(rows: torch.Tensor, layers: Sequence[LoRALinear], call: _Call) -> list[torch.Tensor]:
    if _share_a_launch(layers, call):
        return list(_launch(rows, layers, call).split([layer.base.shape[0] for layer in layers], dim=1))
    if call.triton and len(layers) > 1 and any(_group(layer) is not None for layer in layers):
        return [y for layer in layers for y in _apply(rows, [layer], call)]
    dtypes, flat = call.dtypes(rows, layers), [(layer.settings, layer.slots) for layer in layers]
    with without_autocast(rows):
        return forward(rows, flat, dtypes, False, call.triton)[0]


def _checked_rows(op: str, x: torch.Tensor, layers: Sequence[LoRALinear]) -> torch.Tensor:
    """Return x as ``(rows, in_features)``."""
    check_floating(op, x=x)
    if not layers:
        raise ValueError(f"{op}: there are no layers; give one at least")
    for layer in layers:
        if x.dim() == 0 or x.shape[-1] != layer.base.shape[1]:
            raise ValueError(
                f"{op}: x has shape {tuple(x.shape)} and a weight {tuple(layer.base.shape)}; "
                "they must be (..., K) and (N, K)"
            )
        check_same_device(op, x=x, base=layer.slots[0])
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{op}: x requires a gradient, which decoding has none of; use lora_qkv or lora_mlp")
    rows = rows_of(x) if x.numel() else x.reshape(0, x.shape[-1])
    if rows.shape[0] > MAX_ROWS:
        raise ValueError(f"{op}: x has {rows.shape[0]} rows; it takes up to {MAX_ROWS}, use lora_qkv or lora_mlp")
    return rows


def lora_decode(
    x: torch.Tensor,
    layers: Sequence[LoRALinear],
    *,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, ...]:
    """Apply adapted linear layers to one to eight rows; see the module for maths and numerics.

    Args:
        x: ``(..., in_features)``, floating; the dimensions before the last hold 8 rows at most.
        layers: the layers, all of ``in_features`` columns, with adapters of one dtype; NF4 bases go through the
            kernels, others through a matrix product.
        compute_dtype: of the base products; ``None``: as :func:`.lora_qkv` chooses it.
        lora_dtype: of the adapters' products; likewise.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        ``(..., out_features)`` of each layer, in ``x``'s dtype (under autocast around a 16- or 32-bit base in
        autocast's).

    Raises:
        ValueError: shapes or devices do not fit, there are more than 8 rows, or ``x`` asks for a gradient.
        TypeError: a dtype does not fit.

    Example:
        >>> with torch.no_grad():
        ...     q, k, v = lora_decode(token, [q_layer, k_layer, v_layer])
    """
    rows = _checked_rows("lora_decode", x, layers)
    made = _apply(rows, layers, _Call(compute_dtype, lora_dtype, use_triton(impl, x) and rows.shape[0] > 0))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in made)


def lora_decode_gated(
    x: torch.Tensor,
    gate: LoRALinear,
    up: LoRALinear,
    activation: Gate = "silu",
    *,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Compute ``act(gate(x)) · up(x)`` for one to eight rows, in the launches of the two layers where they share them.

    Args:
        x: as in :func:`lora_decode`.
        gate: the layer whose result goes through the activation.
        up: the other, of the same size.
        activation: ``"silu"``, ``"gelu"`` (with erf) or ``"gelu_tanh"``.
        compute_dtype, lora_dtype, impl: as in :func:`lora_decode`.

    Returns:
        ``(..., out_features)`` in the dtype that the layers' results have. Where both share a launch it is rounded
        once; elsewhere as :func:`.swiglu` and :func:`.geglu` round.

    Raises:
        ValueError: as from :func:`lora_decode`, or the layers differ in size, or the activation does not exist.
        TypeError: a dtype does not fit.

    Example:
        >>> with torch.no_grad():
        ...     y, = lora_decode(lora_decode_gated(token, gate_layer, up_layer), [down_layer])
    """
    if activation not in _KERNEL_NAMES:
        raise ValueError(f"lora_decode_gated: activation is {activation!r}; it must be one of {[*_KERNEL_NAMES]}")
    if gate.base.shape != up.base.shape:
        raise ValueError(
            f"lora_decode_gated: gate is {tuple(gate.base.shape)} and up {tuple(up.base.shape)}; they must be alike"
        )
    layers = gate, up
    rows = _checked_rows("lora_decode_gated", x, layers)
    call = _Call(compute_dtype, lora_dtype, use_triton(impl, x) and rows.shape[0] > 0)
    if _share_a_launch(layers, call):
        y = _launch(rows, layers, call, _KERNEL_NAMES[activation])
    else:
        opened, other = _apply(rows, layers, call)
        y = _GATES[activation](opened, other, impl=impl)
    return y.view(*x.shape[:-1], y.shape[-1])
