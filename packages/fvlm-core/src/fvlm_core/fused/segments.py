"""Attention of a packed row's text, sample by sample, from where the samples start: no mask of tokens by tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvlm_kernels import varlen_attention

if TYPE_CHECKING:
    from torch import nn

PACKED_STARTS = "packed_starts"
"""Key of a packed batch: ``(samples + 1,)`` int32, where each sample starts, and the total."""
PACKED_LONGEST = "packed_longest"
"""Key of a packed batch: a number of tokens that no sample has more of."""
ROW_MULTIPLE = 64
"""Rows of a multiple of this many tokens come in few lengths, so that recordings serve again."""


def attends_by_segments(model: nn.Module) -> bool:
    """Tell whether a model's text layers all take `PACKED_STARTS`.

    They do where they are fused and causal, would use SDPA, drop no weights and have no sliding window; on a GPU also
    only where one launch serves all samples, which torch can from 2.11 on, in 16 bit.
    """
    from fvlm_core.arch import task_model
    from fvlm_core.fused import CAUSAL_LAYER, has_fused
    from fvlm_kernels.varlen_attention import runs_flash

    inner = task_model(model)
    text = inner.config.get_text_config().to_dict()
    plain = not text.get("attention_dropout") and text.get("sliding_window") is None
    if not (plain and has_fused(model, CAUSAL_LAYER) and inner.config._attn_implementation == "sdpa"):
        return False
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return inner.device.type != "cuda" or runs_flash(torch.empty(0, head_dim, dtype=inner.dtype, device=inner.device))


def attend_within(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
    """Attend causally within each sample of one row.

    Args:
        q: ``(1, heads, tokens, head_dim)``.
        k, v: the same, with as many or fewer heads.
        starts: ``(samples + 1,)`` int32.
        longest: at least the number of tokens of the longest sample.
        scale: what the scores are multiplied by.

    Returns:
        ``(1, tokens, heads, head_dim)``.
    """
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    return varlen_attention(q, k, v, starts, longest, causal=True, scale=scale).unsqueeze(0)
