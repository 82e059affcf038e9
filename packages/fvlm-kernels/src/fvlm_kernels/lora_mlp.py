"""A whole MLP of adapted layers as one autograd function: gate, up and down, or fc1 and fc2.

Maths, each layer being adapted as in :mod:`.lora` and f one of ``silu``, ``gelu``, ``gelu_tanh``, ``quick_gelu``::

    gated:  h = f(gate(x)) · up(x),   y = down(h)          plain:  h = f(fc1(x)),   y = fc2(h)

Gradients: those of :mod:`.lora` for the last layer, then dg = dh · u · f'(g) and du = dh · f(g), or dg = dh · f'(g),
then those of :mod:`.lora` for the layers of x.

What is saved: x, the pre-activations g and u, and the products with A; h is computed again in backward, which costs one
element-wise pass instead of the largest activation of the block. Numerics: those of :mod:`.lora`, :mod:`.gated` and
:mod:`.activations`, determinism included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from . import lora_gradients as gradients
from . import lora_steps as steps
from ._launch import Impl, without_autocast
from ._library import first_derivative_only
from .activations import _bwd_into_op as _activation_bwd_
from .activations import _fwd_op as _activation_fwd
from .activations import _ref as _activation_ref
from .gated import _bwd_into_op as _gated_bwd_
from .gated import _fwd_op as _gated_fwd
from .lora import check_input, flat, group, needs_of, runs_triton
from .lora_gradients import Needs, Saved
from .lora_layer import TENSORS, Dtypes, LoRALinear, Settings, Slots, dtypes_for

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu"]
_KERNEL_NAMES = {"gelu": "gelu_erf"}


def _function(x: torch.Tensor, act: str) -> torch.Tensor:
    """Return f(x) in plain PyTorch."""
    return torch.nn.functional.silu(x) if act == "silu" else _activation_ref(x, act)


def _activate(inner: Sequence[torch.Tensor], act: str, triton: bool) -> torch.Tensor:
    """Return h of the pre-activations (g,) or (g, u)."""
    gate, *up = inner
    if not triton:
        return _function(gate, act) * up[0] if up else _function(gate, act)
    made: torch.Tensor = _gated_fwd(gate, up[0], act) if up else _activation_fwd(gate, act)
    return made


def _slope_times(dy: torch.Tensor, x: torch.Tensor, act: str) -> torch.Tensor:
    """Return dy · f'(x) in plain PyTorch."""
    if act == "silu":
        return torch.ops.aten.silu_backward.default(dy, x)  # type: ignore[no-any-return]
    if act == "quick_gelu":
        share = torch.sigmoid(1.702 * x)
        return dy * (share + 1.702 * x * share * (1 - share))
    approximate = "tanh" if act == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.default(dy, x, approximate=approximate)  # type: ignore[no-any-return]


def _activate_backward(
    dh: torch.Tensor, inner: Sequence[torch.Tensor], act: str, triton: bool
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the pre-activations; the first takes the place of ``dh`` where kernels run."""
    if not triton:
        return _slopes_times(dh, inner, act)
    if len(inner) == 1:
        _activation_bwd_(dh, inner[0], act)
        return (dh,)
    dup: torch.Tensor = _gated_bwd_(dh, *inner, act)
    return dh, dup


def _slopes_times(dh: torch.Tensor, inner: Sequence[torch.Tensor], act: str) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the pre-activations in plain PyTorch."""
    if len(inner) == 1:
        return (_slope_times(dh, inner[0], act),)
    gate, up = inner
    return _slope_times(dh * up, gate, act), dh * _function(gate, act)


class _MLP(torch.autograd.Function):
    """Arguments: x as rows, what is no tensor, then the flat tensors of the layers of x and of the last layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        settings: tuple[Settings, ...],
        act: str,
        dtypes: Dtypes,
        dropout: bool,
        triton: bool,
        unread: bool,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        *first, last = group(settings, tensors)
        inner, products, masks = steps.forward(x, first, dtypes, dropout, triton)
        last_products: torch.Tensor | None = None
        last_masks: list[torch.Tensor | None] = [None]
        if unread:
            y = inner[0].new_empty(x.shape[0], last[0].shape[0])
        else:
            h = _activate(inner, act, triton)
            (y,), last_products, last_masks = steps.forward(h, [last], dtypes, dropout, triton)
        *needs, last_need = needs_of(ctx.needs_input_grad[7:])
        kept = (
            x if any(n.a for n in needs) else None,
            products if any(n.b for n in needs) else None,
            last_products if last_need.b else None,
        )
        upstream = ctx.needs_input_grad[0] or any(any(n) for n in needs)
        pre = inner if upstream or last_need.a or (unread and last_need.b) else [None] * len(inner)
        ctx.save_for_backward(*kept, *pre, *masks, *last_masks, *tensors)
        ctx.rest = settings, act, dtypes, triton, x.dtype, upstream
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        settings, act, dtypes, triton, dtype, upstream = ctx.rest
        x, products, last_products, *others = ctx.saved_tensors
        n = len(settings) - 1
        inner, masks, last_masks, tensors = (
            others[:n],
            others[n : 2 * n],
            others[2 * n : 2 * n + 1],
            others[2 * n + 1 :],
        )
        *first, last = group(settings, tensors)
        *needs, last_need = needs_of(ctx.needs_input_grad[7:])
        with without_autocast(dy):
            # h, the largest activation, lives within this call: gone before its gradient takes as much memory again.
            last_made, last_inner = _last_gradients(
                dy, inner, Saved(None, last_products, last_masks), last, dtypes, last_need, upstream, act, triton
            )
            if not upstream:
                return *[None] * (7 + n * TENSORS), *flat(last_made)
            dh = gradients.input_gradient([dy], last_inner, last_masks, [last], dtypes, triton)
            grads = _activate_backward(dh.to(dtypes.out), inner, act, triton)
            saved = Saved(x, products, masks)
            dx, made = gradients.backward(grads, saved, first, dtypes, needs, ctx.needs_input_grad[0], triton)
        return None if dx is None else dx.to(dtype), *[None] * 6, *flat(made), *flat(last_made)


def _last_gradients(
    dy: torch.Tensor,
    inner: Sequence[torch.Tensor],
    saved: Saved,
    last: tuple[Settings, Slots],
    dtypes: Dtypes,
    need: Needs,
    need_inner: bool,
    act: str,
    triton: bool,
) -> tuple[list[gradients.Gradients], torch.Tensor | None]:
    """Return the gradients of the last layer, whose input is computed again from the pre-activations."""
    products_left_out = need.b and saved.products is None
    if need.a or products_left_out:
        h = _activate(inner, act, triton)
        products = steps.input_products(h, [last], dtypes) if products_left_out else saved.products
        saved = Saved(h, products, saved.masks)
    return gradients.parameter_gradients([dy], saved, [last], dtypes, [need], need_inner)


def _check(x: torch.Tensor, first: Sequence[LoRALinear], down: LoRALinear, activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"lora_mlp: activation is {activation!r}; it must be one of {', '.join(get_args(Activation))}")
    if len(first) == 2 and activation == "quick_gelu":
        raise ValueError("lora_mlp: quick_gelu has no gated form; give no up, or silu, gelu or gelu_tanh")
    check_input("lora_mlp", x, first)
    widths = [layer.base.shape[0] for layer in first]
    if len(set(widths)) > 1:
        raise ValueError(f"lora_mlp: gate has {widths[0]} output features but up {widths[1]}; they must have the same")
    if down.base.shape[1] != widths[0]:
        raise ValueError(
            f"lora_mlp: down has {down.base.shape[1]} input features but the layer before it {widths[0]} outputs; they "
            "must be the same"
        )


def lora_mlp(
    x: torch.Tensor,
    gate: LoRALinear,
    up: LoRALinear | None,
    down: LoRALinear,
    activation: Activation = "silu",
    *,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
    unread: bool = False,
) -> torch.Tensor:
    """Apply an MLP of adapted layers; see the module for maths and what is saved.

    Args:
        x: ``(..., in_features)``, floating; any strides.
        gate: the layer whose output is activated; fc1 where there is no ``up``.
        up: the layer that is multiplied with the activation, or ``None``.
        down: the last layer (fc2).
        activation: ``"silu"`` (SwiGLU), ``"gelu"`` (with erf), ``"gelu_tanh"``, or ``"quick_gelu"`` (without ``up``).
        training: whether the layers' dropout acts.
        compute_dtype, lora_dtype: as in :func:`.lora_qkv`.
        impl: how weights are dequantized and activations computed: ``"triton"``, ``"torch"``, or ``None`` for Triton on
            a GPU and PyTorch elsewhere. The products are PyTorch's either way.
        unread: promises that nobody reads the values of the result, only its gradients: a layer that is computed again
            under gradient checkpointing, whose result is known. They are left uninitialized then and the last product
            is left out, a third of the work. Where dropout acts the values are computed all the same.

    Returns:
        ``(..., out_features of down)``, with the dtype rule of :func:`.lora_qkv`. Gradients go to ``x``, every A, B
        and bias, and only to those that ask for one.

    Raises:
        ValueError: shapes or devices do not fit, the activation does not exist, or Triton cannot run here.
        TypeError: ``x`` is not floating, or Triton was asked for in float64.

    Example:
        >>> y = lora_mlp(hidden, gate, up, down)                                  # Llama, Qwen
        >>> y = lora_mlp(patches, fc1, None, fc2, activation="quick_gelu")        # the vision tower of Qwen2-VL
    """
    first = [gate] if up is None else [gate, up]
    _check(x, first, down, activation)
    layers = [*first, down]
    leader = next((layer for layer in layers if layer.a is not None), gate)
    dtypes = dtypes_for(x, leader, compute_dtype, lora_dtype)
    triton = runs_triton(impl, x, dtypes)
    dropout = training and any(layer.dropout > 0 and layer.a is not None for layer in layers)
    settings = tuple(layer.settings for layer in layers)
    tensors = [t for layer in layers for t in layer.slots]
    act = _KERNEL_NAMES.get(activation, activation)
    with without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        y: torch.Tensor = _MLP.apply(rows, settings, act, dtypes, dropout, triton, unread and not dropout, *tensors)
    return y.view(*x.shape[:-1], y.shape[-1])
