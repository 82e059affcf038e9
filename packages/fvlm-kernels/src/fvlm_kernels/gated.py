"""Activations fused with their gate: ``swiglu`` and ``geglu`` (tanh and erf); backward recomputes from the inputs.

Maths, with f of ``_elementwise``'s table (silu for ``swiglu``, a GELU for ``geglu``)::

    y = f(gate) · up

Gradients::

    dgate = dy · up · f'(gate)
    dup   = dy · f(gate)

Numerics. gate and up are read once and everything is computed in fp32. f(gate) is rounded to the inputs' dtype before
it is multiplied, and the product is rounded again: that is how ``act_fn(gate) * up`` rounds in the MLPs of Llama, Qwen,
Pixtral (silu) and Gemma (tanh GELU). The gradients are rounded once. Only gate and up are saved, not f(gate). No
element depends on another: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

from ._elementwise import BLOCK, activate, activation_and_slope, walk
from ._launch import Impl, check_floating, check_same_device, check_same_dtype, check_shape, launch, use_triton
from ._library import first_derivative_only, register
from ._triton import tl, triton
from .activations import Approximate, gelu_name


def _ref(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """Return f(gate) · up in plain PyTorch; float64 stays float64."""
    if act == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


@triton.jit
def _gated_fwd_kernel(gate_ptr, up_ptr, y_ptr, stride_gate, stride_up, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    gate = tl.load(gate_ptr + row * stride_gate + offs_n, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_up + offs_n, mask=mask, other=0.0)
    activated = activate(gate.to(tl.float32), ACT).to(gate.dtype).to(tl.float32)
    tl.store(y_ptr + row * N + offs_n, (activated * up.to(tl.float32)).to(gate.dtype), mask=mask)


@triton.jit
def _gated_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    stride_dy,
    stride_gate,
    stride_up,
    N,
    NEED_DGATE: tl.constexpr,
    NEED_DUP: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    dy = tl.load(dy_ptr + row * stride_dy + offs_n, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + offs_n, mask=mask, other=0.0)
    activated, slope = activation_and_slope(gate.to(tl.float32), ACT)
    if NEED_DGATE:
        up = tl.load(up_ptr + row * stride_up + offs_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + row * N + offs_n, (dy * up * slope).to(gate.dtype), mask=mask)
    if NEED_DUP:
        tl.store(dup_ptr + row * N + offs_n, (dy * activated).to(gate.dtype), mask=mask)


def _gated_fwd(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    y = gate.new_empty(gate.shape)
    (g, u), _, n, grid = walk(gate, up)
    launch(_gated_fwd_kernel, grid, g, u, y, g.stride(0), u.stride(0), n, ACT=act, BLOCK_N=BLOCK, num_warps=4)
    return y


def _gated_bwd(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str, need_dgate: bool, need_dup: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = gate.new_empty(gate.shape if need_dgate else 0)
    dup = up.new_empty(up.shape if need_dup else 0)
    _launch_bwd(dy, gate, up, dgate, dup, act, need_dgate, need_dup)
    return dgate, dup


def _gated_bwd_(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    dup = up.new_empty(up.shape)
    _launch_bwd(dy, gate, up, dy, dup, act, True, True)
    return dup


def _launch_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    act: str,
    need_dgate: bool,
    need_dup: bool,
) -> None:
    (grad, g, u), _, n, grid = walk(dy, gate, up)
    launch(
        _gated_bwd_kernel,
        grid,
        grad,
        g,
        u,
        dgate,
        dup,
        grad.stride(0),
        g.stride(0),
        u.stride(0),
        n,
        NEED_DGATE=need_dgate,
        NEED_DUP=need_dup,
        ACT=act,
        BLOCK_N=BLOCK,
        num_warps=4,
    )


_fwd_op = register(
    "gated_fwd(Tensor gate, Tensor up, str act) -> Tensor", _gated_fwd, lambda gate, up, act: gate.new_empty(gate.shape)
)
_bwd_op = register(
    "gated_bwd(Tensor dy, Tensor gate, Tensor up, str act, bool need_dgate, bool need_dup)"
    " -> (Tensor dgate, Tensor dup)",
    _gated_bwd,
    lambda dy, gate, up, act, need_dgate, need_dup: (
        gate.new_empty(gate.shape if need_dgate else 0),
        up.new_empty(up.shape if need_dup else 0),
    ),
)
_bwd_into_op = register(
    "gated_bwd_(Tensor(a!) dy, Tensor gate, Tensor up, str act) -> Tensor dup",
    _gated_bwd_,
    lambda dy, gate, up, act: up.new_empty(up.shape),
)
"""dgate in the place of dy, which is contiguous and of gate's dtype; dup is returned."""


class _Gated(torch.autograd.Function):
    """f(gate) · up, saving the two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        y: torch.Tensor = _fwd_op(gate, up, act)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        need_dgate, need_dup, _ = ctx.needs_input_grad
        dgate, dup = _bwd_op(dy, gate, up, ctx.act, need_dgate, need_dup)
        return dgate if need_dgate else None, dup if need_dup else None, None


def _gated(op: str, gate: torch.Tensor, up: torch.Tensor, act: str, impl: Impl | None) -> torch.Tensor:
    check_floating(op, gate=gate, up=up)
    check_shape(op, "up", up, gate.shape)
    check_same_dtype(op, gate=gate, up=up)
    check_same_device(op, gate=gate, up=up)
    if not use_triton(impl, gate, up):
        return _ref(gate, up, act)
    y: torch.Tensor = _Gated.apply(gate, up, act)
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: Impl | None = None) -> torch.Tensor:
    """Compute ``silu(gate) * up``; see the module for maths and numerics.

    Args:
        gate: any shape, floating; any strides, such as one half of a fused projection.
        up: same shape and dtype as ``gate``.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        a contiguous tensor of the same shape and dtype.

    Raises:
        ValueError: shapes or devices differ, a choice does not exist, or Triton cannot run here.
        TypeError: a dtype is not floating, or the two differ.

    Example:
        >>> hidden = down_proj(swiglu(gate_proj(x), up_proj(x)))
    """
    return _gated("swiglu", gate, up, "silu", impl)


def geglu(
    gate: torch.Tensor, up: torch.Tensor, approximate: Approximate = "tanh", *, impl: Impl | None = None
) -> torch.Tensor:
    """Compute ``gelu(gate) * up``; see the module for maths and numerics.

    Args:
        gate: any shape, floating; any strides, such as one half of a fused projection.
        up: same shape and dtype as ``gate``.
        approximate: ``"tanh"`` (Gemma) or ``"none"`` for the form with erf.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        a contiguous tensor of the same shape and dtype.

    Raises:
        ValueError: shapes or devices differ, a choice does not exist, or Triton cannot run here.
        TypeError: a dtype is not floating, or the two differ.

    Example:
        >>> hidden = down_proj(geglu(gate_proj(x), up_proj(x)))
    """
    return _gated("geglu", gate, up, gelu_name("geglu", approximate), impl)
