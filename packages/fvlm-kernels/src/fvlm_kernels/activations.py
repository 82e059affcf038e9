"""Activations of vision MLPs: ``gelu`` (erf and tanh) and ``quick_gelu``; backward recomputes from the input.

Maths and gradients: y = f(x) and dx = dy · f'(x), with f and f' in the table of ``_elementwise``.

Numerics. x is read once and everything is computed in fp32. ``gelu`` rounds once, as
``torch.nn.functional.gelu`` does (``GELUActivation``, ``GELUTanh``). ``quick_gelu`` rounds 1.702·x, its sigmoid and the
product to x's dtype one after another, as ``QuickGELUActivation`` does; its backward is computed in fp32 and rounded
once. Only x is saved. No element depends on another: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ._elementwise import BLOCK, activate, activation_and_slope, walk
from ._launch import Impl, check_floating, launch, use_triton
from ._library import first_derivative_only, register
from ._triton import tl, triton

Approximate = Literal["none", "tanh"]


def _ref(x: torch.Tensor, act: str) -> torch.Tensor:
    """Return f(x) of the module's maths in plain PyTorch; float64 stays float64."""
    if act == "quick_gelu":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return x * torch.sigmoid((1.702 * wide).to(x.dtype))
    return torch.nn.functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


@triton.jit
def _activation_fwd_kernel(x_ptr, y_ptr, stride_x, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_x + offs_n, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    if ACT == "quick_gelu":
        inner = (1.702 * wide).to(x.dtype).to(tl.float32)
        y = wide * tl.sigmoid(inner).to(x.dtype).to(tl.float32)
    else:
        y = activate(wide, ACT)
    tl.store(y_ptr + row * N + offs_n, y.to(x.dtype), mask=mask)


@triton.jit
def _activation_bwd_kernel(dy_ptr, x_ptr, dx_ptr, stride_dy, stride_x, N, ACT: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    dy = tl.load(dy_ptr + row * stride_dy + offs_n, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * stride_x + offs_n, mask=mask, other=0.0)
    _, slope = activation_and_slope(x.to(tl.float32), ACT)
    tl.store(dx_ptr + row * N + offs_n, (dy.to(tl.float32) * slope).to(x.dtype), mask=mask)


def _activation_fwd(x: torch.Tensor, act: str) -> torch.Tensor:
    y = x.new_empty(x.shape)
    (rows,), _, n, grid = walk(x)
    launch(_activation_fwd_kernel, grid, rows, y, rows.stride(0), n, ACT=act, BLOCK_N=BLOCK, num_warps=4)
    return y


def _activation_bwd(dy: torch.Tensor, x: torch.Tensor, act: str) -> torch.Tensor:
    dx = x.new_empty(x.shape)
    _launch_bwd(dy, x, dx, act)
    return dx


def _activation_bwd_(dy: torch.Tensor, x: torch.Tensor, act: str) -> None:
    _launch_bwd(dy, x, dy, act)


def _launch_bwd(dy: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, act: str) -> None:
    (grad, rows), _, n, grid = walk(dy, x)
    strides = grad.stride(0), rows.stride(0)
    launch(_activation_bwd_kernel, grid, grad, rows, dx, *strides, n, ACT=act, BLOCK_N=BLOCK, num_warps=4)


_fwd_op = register("activation_fwd(Tensor x, str act) -> Tensor", _activation_fwd, lambda x, act: x.new_empty(x.shape))
_bwd_op = register(
    "activation_bwd(Tensor dy, Tensor x, str act) -> Tensor", _activation_bwd, lambda dy, x, act: x.new_empty(x.shape)
)
_bwd_into_op = register(
    "activation_bwd_(Tensor(a!) dy, Tensor x, str act) -> ()", _activation_bwd_, lambda dy, x, act: None
)
"""dx in the place of dy, which is contiguous and of x's dtype."""


class _Activation(torch.autograd.Function):
    """f(x), saving x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.act = act
        y: torch.Tensor = _fwd_op(x, act)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _bwd_op(dy, x, ctx.act), None


def _activation(op: str, x: torch.Tensor, act: str, impl: Impl | None) -> torch.Tensor:
    check_floating(op, x=x)
    if not use_triton(impl, x):
        return _ref(x, act)
    y: torch.Tensor = _Activation.apply(x, act)
    return y


def gelu(x: torch.Tensor, approximate: Approximate = "none", *, impl: Impl | None = None) -> torch.Tensor:
    """Apply the Gaussian error linear unit; see ``_elementwise`` for the maths.

    Args:
        x: any shape, floating; any strides.
        approximate: ``"none"`` for the form with erf, ``"tanh"`` for the approximation.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        a tensor of ``x``'s shape and dtype.

    Raises:
        ValueError: a choice does not exist, or Triton cannot run here.
        TypeError: ``x`` is not floating.

    Example:
        >>> hidden = gelu(fc1(hidden), approximate="tanh")
    """
    return _activation("gelu", x, gelu_name("gelu", approximate), impl)


def quick_gelu(x: torch.Tensor, *, impl: Impl | None = None) -> torch.Tensor:
    """Apply x · σ(1.702 x), the activation of Qwen2-VL's and CLIP's vision towers.

    Args:
        x: any shape, floating; any strides.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Returns:
        a tensor of ``x``'s shape and dtype.

    Raises:
        ValueError: a choice does not exist, or Triton cannot run here.
        TypeError: ``x`` is not floating.

    Example:
        >>> hidden = fc2(quick_gelu(fc1(hidden)))
    """
    return _activation("quick_gelu", x, "quick_gelu", impl)


def gelu_name(op: str, approximate: str) -> str:
    """Return the kernels' name for a form of GELU; a ``ValueError`` where there is no such form."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'{op}: approximate is {approximate!r}; it must be "none" or "tanh"')
    return "gelu_tanh" if approximate == "tanh" else "gelu_erf"
