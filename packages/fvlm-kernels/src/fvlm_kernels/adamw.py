"""One AdamW step over a flat buffer of parameters, gradient clipping included, in one launch and without waiting.

Maths (Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019), t being the number of the step, from 1::

    g = grad · min(1, max_norm / (grad_norm + 1e-6))
    m = β₁ m + (1 − β₁) g                     v = β₂ v + (1 − β₂) g²
    p = (1 − lr · λ) p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

as ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW`` compute them one after the other. Clipping costs no pass
of its own: the factor is formed where the gradient is read.

Numerics. Parameters and gradients are read in their dtype, moments are fp32 whatever it is, and all is computed in
fp32; the parameter is rounded once. 1 − βᵗ is formed in float64, for in fp32 its first steps would lose four digits.
The step count and the norm are read on the device, so that nothing waits and a captured graph counts on. Two runs give
the same bits.
"""

# mypy: allow-untyped-defs
# (for the kernel, whose arguments Triton types)

from __future__ import annotations

import math

import torch

from ._launch import Impl, cdiv, check_floating, check_same_device, check_same_dtype, check_shape, launch, use_triton
from ._library import register
from ._triton import tl, triton

BLOCK = 1024
"""Elements of one program: 8 of each of the four tensors for each of its 128 threads."""


def _ref(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    grad_norm: torch.Tensor | None,
    max_norm: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The module's maths in plain PyTorch, in place; float64 stays float64."""
    wide = torch.promote_types(param.dtype, torch.float32)
    g = grad.to(wide)
    if grad_norm is not None:
        g = g * (max_norm / (grad_norm.to(wide) + 1e-6)).clamp(max=1.0)
    t = step.double()
    exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale, root = (lr / (1 - beta1**t)).to(wide), (1 - beta2**t).sqrt().to(wide)
    update = scale * exp_avg / (exp_avg_sq.sqrt() / root + eps)
    param.copy_(param.to(wide) * (1 - lr * weight_decay) - update)


@triton.jit
def _adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    norm_ptr,
    max_norm,
    lr,
    decay,
    eps,
    numel,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < numel
    t = tl.load(step_ptr).to(tl.float64)
    scale = lr / (1.0 - tl.exp(t * LOG_BETA1)).to(tl.float32)
    root = tl.sqrt_rn((1.0 - tl.exp(t * LOG_BETA2)).to(tl.float32))
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if CLIPPED:
        factor = max_norm / (tl.load(norm_ptr).to(tl.float32) + 1e-6)
        g *= tl.where(factor > 1.0, 1.0, factor)  # a NaN stays one
    p = tl.load(param_ptr + offs, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0) * BETA1 + g * (1.0 - BETA1)
    v = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0) * BETA2 + g * g * (1.0 - BETA2)
    new = p.to(tl.float32) * decay - scale * m / (tl.sqrt_rn(v) / root + eps)
    tl.store(exp_avg_ptr + offs, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v, mask=mask)
    tl.store(param_ptr + offs, new.to(p.dtype), mask=mask)


def _adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    grad_norm: torch.Tensor | None,
    max_norm: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    launch(
        _adamw_kernel,
        (cdiv(param.numel(), BLOCK),),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        grad_norm,
        max_norm,
        lr,
        1 - lr * weight_decay,
        eps,
        param.numel(),
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=math.log(beta1) if beta1 else -math.inf,
        LOG_BETA2=math.log(beta2) if beta2 else -math.inf,
        CLIPPED=grad_norm is not None,
        BLOCK_N=BLOCK,
        num_warps=4,
    )


_op = register(
    "adamw_flat_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step,"
    " Tensor? grad_norm, float max_norm, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    _adamw,
    lambda *_: None,
)


def _check(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    scalars: dict[str, torch.Tensor | None],
) -> None:
    op, (exp_avg, exp_avg_sq) = "adamw_flat_", moments
    tensors = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_floating(op, **tensors)
    check_same_dtype(op, param=param, grad=grad)
    check_same_device(op, **tensors, **scalars)
    wide = torch.promote_types(param.dtype, torch.float32)
    for name, tensor in tensors.items():
        check_shape(op, name, tensor, param.shape)
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; it must be contiguous")
        if name not in ("param", "grad") and tensor.dtype != wide:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; for parameters in {param.dtype} it must be {wide}")
    for name, scalar in scalars.items():
        check_shape(op, name, scalar, ())
        if scalar is not None and (scalar.is_complex() or scalar.dtype == torch.bool):
            raise TypeError(f"{op}: {name} has dtype {scalar.dtype}; it must be a number, such as one in torch.float32")


@torch.no_grad()
def adamw_flat_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_norm: torch.Tensor | None = None,
    max_norm: float | None = None,
    impl: Impl | None = None,
) -> None:
    """Take one AdamW step in place; see the module for maths and numerics.

    Args:
        param: any shape, floating, contiguous: all parameters of one learning rate in one buffer. Changed.
        grad: of its shape and dtype, contiguous. Not changed by clipping.
        exp_avg, exp_avg_sq: of its shape, fp32, contiguous; zeros before the first step. Changed.
        step: 0-d, on the same device: steps taken so far, 0 before the first. Increased by one.
        lr: learning rate.
        betas: β₁ and β₂, from 0 to below 1.
        eps: added to the root of the second moment.
        weight_decay: λ, decoupled from the gradient.
        grad_norm: 0-d, on the same device: the norm that clipping goes by, such as ``torch.linalg.vector_norm(grad)``,
            or that of several buffers together.
        max_norm: what the gradient is clipped to; given with ``grad_norm`` or not at all.
        impl: ``"triton"``, ``"torch"``, or ``None`` for Triton on a GPU and PyTorch elsewhere.

    Raises:
        ValueError: shapes, devices, strides or options do not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> norm = torch.linalg.vector_norm(flat.grad)
        >>> adamw_flat_(flat, flat.grad, exp_avg, exp_avg_sq, step, lr=2e-4, grad_norm=norm, max_norm=1.0)
    """
    _check(param, grad, (exp_avg, exp_avg_sq), {"step": step, "grad_norm": grad_norm})
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "max_norm": 0.0 if max_norm is None else max_norm}
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"adamw_flat_: {name} is {number}; it must not be negative")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_flat_: betas are {betas}; they must lie in [0, 1)")
    if (grad_norm is None) != (max_norm is None):
        missing = "grad_norm" if grad_norm is None else "max_norm"
        raise ValueError(f"adamw_flat_: {missing} is missing; clipping needs both grad_norm and max_norm")
    run = _op if use_triton(impl, param) else _ref
    step.add_(1)
    run(param, grad, exp_avg, exp_avg_sq, step, grad_norm, numbers["max_norm"], lr, *betas, eps, weight_decay)
