"""Attention over packed images of several sizes, without a Python loop over them.

Vision towers that pack all patches of a batch into one row (the Qwen-VL families) call the attention function once per
image, or per window, unless its registered name says that it takes cumulative lengths: transformers reads any name with
`flash` in it that way. `varlen_attention_forward` is registered under such a name (transformers' own attention
interface; no class is changed) and computes what stock SDPA does image by image:

* images of one size (`count · longest == total`, known without asking the device) run as one batched SDPA
  call on views;
* images of different sizes on a GPU in half precision go to `fvlm_kernels.varlen_attention`;
* of both, those with many patches go to FlashAttention-4 where it is installed (`fvlm_core.flash`);
* anything else is split and looped over, as stock does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fvlm_core import flash
from fvlm_core.passes import quick_attention
from fvlm_kernels import varlen_attention
from fvlm_kernels.varlen_attention import runs_flash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARLEN_ATTENTION = "fvlm_flash_varlen"


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment of one packed row; the signature is transformers' attention interface.

    Args:
        module: the calling attention module (part of the interface; not read).
        query: `(1, heads, total, head_dim)`.
        key: `(1, heads, total, head_dim)`.
        value: `(1, heads, total, head_dim)`.
        attention_mask: must be `None`; the segments are the mask.
        scaling: what the scores are multiplied by.
        dropout: probability of dropping an attention weight.
        cu_seq_lens_q: `(segments + 1,)` int32, where each segment starts, and the total.
        max_length_q: length of the longest segment.
        is_causal: whether a token sees only what comes before it in its segment.
        **kwargs: the rest of the interface (the key lengths equal the query lengths in self-attention).

    Returns:
        The output `(1, total, heads, head_dim)`, and `None` for the attention weights.

    Raises:
        ValueError: when called without lengths, or with a mask.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise ValueError(
            f"{VARLEN_ATTENTION} needs cumulative lengths and no mask; set attn_implementation='sdpa' instead"
        )
    total = query.shape[2]
    count = cu_seq_lens_q.numel() - 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        quick = None if dropout else quick_attention(q, k, v, causal=is_causal, scale=scaling)
        if quick is not None:
            return quick
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scaling)

    if count * max_length_q == total:

        def batched(packed: Tensor) -> Tensor:
            # squeeze, since the gradient of an index is zeros with a copy in them
            by_segment: Tensor = packed.squeeze(0).unflatten(1, (count, max_length_q))
            return by_segment.transpose(0, 1)

        out = attend(batched(query), batched(key), batched(value))
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), None
    if dropout == 0.0 and runs_flash(query):
        q, k, v = (packed.squeeze(0).transpose(0, 1) for packed in (query, key, value))
        if flash.takes(q, k, causal=is_causal, longest=max_length_q):
            bounds = cu_seq_lens_q.to(torch.int32)
            out = flash.attention(q, k, v, causal=is_causal, scale=scaling, cu=bounds, longest=max_length_q)
        else:
            out = varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, causal=is_causal, scale=scaling, impl="flash")
        return out.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = zip(*(packed.split(lengths, dim=2) for packed in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v) for q, k, v in pieces], dim=2).transpose(1, 2), None


def use_varlen_attention(tower: PreTrainedModel) -> None:
    """Let a vision tower that packs its images attend through `varlen_attention_forward`.

    Args:
        tower: a vision tower (e.g. `model.model.visual`) whose attention takes cumulative lengths.
    """
    vars(tower)["_fvlm_attention"] = _Registered()
    tower.config._attn_implementation = VARLEN_ATTENTION


class _Registered:
    """Makes the name of the attention known, also in a process into which a stored tower is loaded."""

    def __init__(self) -> None:
        AttentionInterface.register(VARLEN_ATTENTION, varlen_attention_forward)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Registered, ()
