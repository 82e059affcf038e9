"""FlashAttention-4 on Hopper GPUs, where it is installed (`pip install 'fvlm-core[flash]'`) and beats PyTorch.

It does so where many patches see each other: heads of 72 or 80 channels, those of most vision towers, for which
cuDNN's attention computes with 128; and images of several sizes in one row, which PyTorch's variable-length attention
takes at half the speed (docs/performance.md has the figures). Elsewhere, and without the package, `takes` says no and
PyTorch's operators run. The maths are those of `fvlm_kernels.attention_with_residuals`; scores and sums in fp32,
probabilities rounded to the inputs' dtype for the second product. The gradients of the queries are added up with
atomics, so that two runs may differ in the last bits; under `torch.use_deterministic_algorithms` it is not used.

The package is young and its interface moves, so each form (width, dtype, causal, segments) is compared with PyTorch's
plain attention on a small input before it is first used; one that fails, or parts from it, is left alone with a word
in the log.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fvlm_kernels import AttentionResiduals

logger = logging.getLogger(__name__)
NAME = "fa4"
"""What `AttentionResiduals.backend` is for results of this module."""
FROM = 2048
"""Keys that a query sees on average, of the longest segment, from which on it pays to import the package (seconds)."""
CAPABILITY = (9, 0)
_TOLERANCE = 8e-3
"""The largest distance from PyTorch's attention in fp32, relative to its norm; kernels that are right have 2e-3."""
_HEADS = 16
"""Heads of the comparison: with its rows enough tiles that not all run at once on a GPU, and one may undo another's."""
_FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError, OSError)
"""What a package of another version may raise: its interface moves."""


def takes(q: Tensor, k: Tensor, *, causal: bool, longest: int | None = None) -> bool:
    """Say whether `attention` is to be used.

    Args:
        q: `(batch, heads, tokens, head_dim)`, or `(total, heads, head_dim)` with segments.
        k: like `q`; fewer heads of its own are left to PyTorch.
        causal: whether a token sees only what comes before it.
        longest: length of the longest segment, of a row that holds several; None: all tokens of a row see each other.
    """
    width, segments = q.shape[-1], longest is not None
    if not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape == k.shape and width % 8 == 0):
        return False
    if not (segments or 64 < width < 128) or width > 128 or q.numel() == 0:
        return False
    if (q.shape[2] if longest is None else longest) < FROM * (2 if causal else 1):
        return False
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled() or not _installed():
        return False
    return _right(q.device, q.dtype, width, causal, segments)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    cu: Tensor | None = None,
    longest: int | None = None,
    known: AttentionResiduals | None = None,
) -> Tensor:
    """Attend, with gradients; only where `takes` says so.

    Args:
        q: `(batch, heads, tokens, head_dim)`, or `(total, heads, head_dim)` with `cu`; bf16 or fp16.
        k: like `q`.
        v: like `q`.
        causal: whether a token sees only what comes before it.
        scale: what the scores are multiplied by.
        cu: `(segments + 1,)` int32, where each segment starts, and the total; None: all tokens of a row see each other.
        longest: length of the longest segment, with `cu`.
        known: what `residuals` returned for the same inputs: nothing is computed but the gradients.

    Returns:
        The result, in the shape of `q`.
    """
    out: Tensor = _Flash.apply(q, k, v, causal, scale, cu, longest, known)  # type: ignore[no-untyped-call]
    return out


def residuals(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> AttentionResiduals:
    """Attend without autograd; return the result with what its gradients need, for `attention` to take as `known`."""
    with torch.no_grad():
        out, lse = _kernels().forward(*(t.transpose(1, 2) for t in (q, k, v)), scale, causal)
    return AttentionResiduals(NAME, out.transpose(1, 2), lse)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        cu: Tensor | None,
        longest: int | None,
        known: AttentionResiduals | None,
    ) -> Tensor:
        rows = cu is None
        if known is None:
            made = _kernels().forward(*(_tokens_first(t, rows) for t in (q, k, v)), scale, causal, cu, longest)
            out, lse = _tokens_first(made[0], rows), made[1]
        else:
            out, lse = known.out.view_as(known.out), known.logsumexp
        ctx.save_for_backward(q, k, v, out, lse, cu)
        ctx.rest = causal, scale, longest
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, lse, cu = ctx.saved_tensors
        causal, scale, longest = ctx.rest
        rows = cu is None
        inputs = [_tokens_first(t, rows) for t in (q, k, v, out, dout)]
        grads = _kernels().backward(*inputs, lse, scale, causal, cu, longest)
        return *(_tokens_first(grad, rows) for grad in grads), None, None, None, None, None


def _tokens_first(t: Tensor, rows: bool) -> Tensor:
    """Swap heads and tokens of a batch; a row of segments has its tokens first."""
    return t.transpose(1, 2) if rows else t


@cache
def _installed() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # no package flash_attn at all
        return False


@cache
def _kernels() -> ModuleType:
    # What it compiles is kept between processes: by default it is not, or in a folder that all users share.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(Path.home() / ".cache" / "fvlm" / "flash"))
    from fvlm_core.flash import kernels

    return kernels


_checked: dict[tuple[Any, ...], bool] = {}


def _right(device: torch.device, dtype: torch.dtype, width: int, causal: bool, segments: bool) -> bool:
    key = device, dtype, width, causal, segments
    if key not in _checked:
        if torch.cuda.get_device_capability(device) != CAPABILITY:
            _checked[key] = False
        elif torch.cuda.is_current_stream_capturing():
            return False  # it compiles and compares, which no recording can hold; the call before it was not recorded
        else:
            _checked[key] = _agrees(device, dtype, width, causal, segments)
    return _checked[key]


def _agrees(device: torch.device, dtype: torch.dtype, width: int, causal: bool, segments: bool) -> bool:
    """Compare result and gradients with plain attention in fp32, on lengths that fill no block."""
    lengths = (200, 0, 77, 1, 320, 150, 64, 65) * 6 if segments else (150,) * 48
    try:
        # without autograd, since the layer that asks may be one whose saved tensors are counted or moved
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            parted = _distance(device, dtype, width, causal, lengths, segments)
    except _FAILURES as error:
        logger.warning("FlashAttention-4 is not used for heads of %d channels: %s", width, error)
        return False
    if not parted < _TOLERANCE:
        logger.warning(
            "FlashAttention-4 is not used for heads of %d channels: it parts from PyTorch by %.1e", width, parted
        )
    return parted < _TOLERANCE


def _distance(
    device: torch.device, dtype: torch.dtype, width: int, causal: bool, lengths: tuple[int, ...], segments: bool
) -> float:
    generator = torch.Generator(device).manual_seed(0)  # of its own: the run's random numbers stay what they are
    shape, scale = (sum(lengths), _HEADS, width), width**-0.5
    given = [torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(4)]
    cu, longest, inputs = None, None, given
    if segments:
        cu, longest = torch.tensor([0, *accumulate(lengths)], device=device, dtype=torch.int32), max(lengths)
    else:
        inputs = [t.unflatten(0, (len(lengths), -1)) for t in given]
    *qkv, dout = inputs
    # What the kernels allocate shall hold rubbish before, as in a training run.
    rubbish = [torch.full((size,), 1e4, device=device) for size in (2**18,) * 4 + (2**24,) * 4]
    del rubbish
    out, lse = _kernels().forward(*qkv, scale, causal, cu, longest)
    got = [out, *_kernels().backward(*qkv, out, dout, lse, scale, causal, cu, longest)]
    pieces = zip(*(t.float().transpose(0, 1).split(lengths, dim=1) for t in given), strict=True)
    want = zip(*(_plain(a, b, c, d, causal, scale) for a, b, c, d in pieces), strict=True)
    pairs = ((a.float().reshape(shape), torch.cat(b, dim=1).transpose(0, 1)) for a, b in zip(got, want, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _plain(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """Return the result of attention among `(heads, tokens, head_dim)` and its gradients, by the paper."""
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    weights = scores.softmax(-1)
    out = weights @ v
    slopes = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    return out, slopes @ k, slopes.mT @ q, weights.mT @ dout
