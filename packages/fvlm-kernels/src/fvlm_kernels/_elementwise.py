"""What the activations share: their maths inside a kernel, and how a launch walks over rows or over flat memory.

============  ===================================  =====================================================================
name          f(x)                                 f'(x)
============  ===================================  =====================================================================
silu          x · σ(x)                             σ(x) · (1 + x · (1 − σ(x)))
gelu_erf      x · (1 + erf(x / √2)) / 2            (1 + erf(x / √2)) / 2 + x · exp(−x² / 2) / √(2π)
gelu_tanh     x · σ(2u), u = √(2/π)(x + 0.044715x³)  σ(2u) + 2x · σ(2u) · (1 − σ(2u)) · √(2/π)(1 + 0.134145x²)
quick_gelu    x · σ(1.702x)                        σ(1.702x) · (1 + 1.702x · (1 − σ(1.702x)))
============  ===================================  =====================================================================

(1 + erf(x / √2)) / 2 is taken from its smaller side, ½ erfc(|x| / √2) = t · 2^(Q(t) − x² log₂(e) / 2) with
t = 1 / (1 + 0.4 |x| / √2) and a polynomial Q of degree 8, fitted to a relative 1e-7: fewer instructions than erf, and
no difference of nearly equal numbers far below zero. (1 + tanh(u)) / 2 is σ(2u) exactly, which needs no tanh. 1 − σ(z)
is taken as σ(−z), since the difference would lose the digits that the slope multiplies by x. Sources: Hendrycks and
Gimpel, Gaussian Error Linear Units, 2016, for the three GELUs; Elfwing, Uchibe and Doya, Sigmoid-Weighted Linear Units,
2017, for silu.
"""

from __future__ import annotations

import torch

from ._launch import cdiv, rows_of
from ._triton import tl, triton

BLOCK = 2048
"""Elements of one program: 16 for each of its 128 threads."""


@triton.jit
def _scaled_tail(x):
    """Return t and Q(t): the share of the normal distribution beyond |x| is t · 2^(Q(t) − x² log₂(e) / 2)."""
    t = 1.0 / (1.0 + 0.28284271247461906 * tl.abs(x))
    q = 1.3453177124223532 - 0.301584620707448 * t
    q = q * t - 2.168399589578714
    q = q * t + 1.471011960317431
    q = q * t - 0.6612801421810485
    q = q * t + 0.44306681368916584
    q = q * t + 0.5741048052437427
    q = q * t + 1.4455445084974563
    return t, q * t - 3.147781579163371


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Return f(x) in fp32."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    if ACT == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    if ACT == "gelu_erf":
        t, q = _scaled_tail(x)
        tail = t * tl.exp2(q - 0.7213475204444817 * x * x)
        return x * tl.where(x > 0, 1.0 - tail, tail)  # not x − x · tail, which is no number where x is infinite
    return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def activation_and_slope(x, ACT: tl.constexpr):
    """Return ``(f(x), f'(x))`` in fp32."""
    if ACT == "gelu_erf":
        t, q = _scaled_tail(x)
        bell = tl.exp2(-0.7213475204444817 * x * x)
        tail = t * tl.exp2(q) * bell
        share = tl.where(x > 0, 1.0 - tail, tail)
        return x * share, share + x * 0.3989422804014327 * bell
    if ACT == "silu":
        inner = x
        inner_slope = 1.0
    elif ACT == "quick_gelu":
        inner = 1.702 * x
        inner_slope = 1.702
    else:
        inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    small = tl.exp(-tl.abs(inner))
    larger = 1.0 / (1.0 + small)
    share = tl.where(inner > 0, larger, small * larger)
    return x * share, share + x * (small * larger) * larger * inner_slope  # σ(z) σ(−z) is small · larger² either way


def walk(*tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], int, int, tuple[int]]:
    """Arrange tensors of one shape for an element-wise launch.

    Contiguous ones count as a single row, so that a ragged width wastes no lanes; others are walked row by row, which
    reads the halves of a fused projection where they lie.

    Returns:
        the tensors as ``(M, N)``, M, N, and a grid of programs of ``BLOCK`` elements, those of a row together.
    """
    if all(t.is_contiguous() for t in tensors):
        rows = tuple(t.view(1, -1) for t in tensors)
    else:
        rows = tuple(rows_of(t) for t in tensors)
    m, n = rows[0].shape
    return rows, m, n, (m * cdiv(n, BLOCK),)
