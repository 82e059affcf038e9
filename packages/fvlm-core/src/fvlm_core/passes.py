"""What the two passes of a checkpointed layer tell each other, where the code that runs the layer asks for it.

A layer under gradient checkpointing runs twice: forward for its result, and again in the backward pass for its
gradients. The second run need not compute

* the result itself, which nobody reads: the last product of the MLP and the last addition are left out;
* what the first run kept. Attention over thousands of tokens takes longer to compute again than its result takes to
  come back from host memory, so that result is kept, and queries, keys and values are computed again.

The fused layers ask here which run it is; outside of `running` nothing is kept and nothing left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fvlm_core import flash
from fvlm_kernels import AttentionResiduals, attention_from_residuals, attention_with_residuals

if TYPE_CHECKING:
    from collections.abc import Callable

KEEP_FROM = 2048
"""Keys that a query sees on average, from which on a result is kept: the time to compute it again grows with them, the
time to fetch it does not (docs/performance.md has both)."""


class LayerPass:
    """One run of a layer.

    Args:
        again: whether it is the second one.
        kept: what the first one kept, in the order in which it is asked for.
        keep_from: how many keys a query must see on average for its result to be kept; None: none is.
    """

    def __init__(
        self, again: bool, kept: Sequence[AttentionResiduals | None] = (), keep_from: int | None = None
    ) -> None:
        self.again, self.kept, self.keep_from = again, list(kept), keep_from
        self.unread = False
        """Whether nobody reads the result of what is being called."""

    def keeps(self, q: Tensor, k: Tensor, causal: bool) -> bool:
        """Tell whether the result of attention is kept from the first run to the second."""
        if self.keep_from is None or q.shape[1] != k.shape[1]:
            return False
        return k.shape[2] >= self.keep_from * (2 if causal else 1)


_running: ContextVar[LayerPass | None] = ContextVar("fvlm_layer_pass", default=None)


@contextmanager
def running(this: LayerPass) -> Iterator[LayerPass]:
    """A context in which fused layers know which run of a checkpointed layer they are part of."""
    token = _running.set(this)
    try:
        yield this
    finally:
        _running.reset(token)


def result_is_unread() -> bool:
    """Tell an MLP whether only the gradients of its result are wanted."""
    this = _running.get()
    return this is not None and this.unread


def quick_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor | None:
    """Attend with a result that is kept between the passes, or by FlashAttention-4; None where PyTorch is to attend.

    Args:
        q: `(batch, heads, tokens, head_dim)`.
        k: as many heads, `(batch, heads, keys, head_dim)`.
        v: like `k`.
        causal: whether a token sees only what comes before it.
        scale: what the scores are multiplied by.

    Returns:
        The attention's result in the shape of `q`.
    """
    this = _running.get()
    if this is None or not this.keeps(q, k, causal):
        return flash.attention(q, k, v, causal=causal, scale=scale) if flash.takes(q, k, causal=causal) else None
    if this.again:
        known = this.kept.pop(0)
        if known is not None and known.backend == flash.NAME:
            return flash.attention(q, k, v, causal=causal, scale=scale, known=known)
        return None if known is None else attention_from_residuals(q, k, v, known, causal=causal, scale=scale)
    if flash.takes(q, k, causal=causal):
        made: AttentionResiduals | None = flash.residuals(q, k, v, causal=causal, scale=scale)
    else:
        made = attention_with_residuals(q, k, v, causal=causal, scale=scale)
    this.kept.append(made)
    return None if made is None else made.out


def add_last(residual: Tensor, last: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``residual + last(x)``, the result of a layer; its values are not computed in the layer's second run.

    Args:
        residual: ``(..., hidden)``.
        last: the last part of the layer, an MLP.
        x: ``(..., hidden)``, what goes into it.
    """
    this = _running.get()
    if this is None or not this.again:
        return residual + last(x)
    this.unread = True
    try:
        made = last(x)
    finally:
        this.unread = False
    out: Tensor = _UnreadSum.apply(residual, made)  # type: ignore[no-untyped-call]
    return out


class _UnreadSum(torch.autograd.Function):
    """The gradients of a sum without the sum."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.dtypes = a.dtype, b.dtype
        return a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, b.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        first, second = ctx.dtypes
        return grads[0].to(first), grads[0].to(second)
