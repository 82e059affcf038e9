"""Attention over packed images of several sizes, without a Python loop over them.

Vision towers that pack all patches of a batch into one row (the Qwen-VL families) call the attention function once per
image, or per window, unless its registered name says that it takes cumulative lengths: transformers reads any name with
`flash` in it that way. `varlen_attention_forward` is registered under such a name (transformers' own attention
interface; no class is changed) and computes what stock SDPA does image by image:

* images of one size (`count · longest == total`, known without asking the device) run as one batched SDPA
  call on views;
* images of different sizes on a GPU in half precision go to `torch.nn.attention.varlen`;
* anything else is split and looped over, as stock does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fvlm_core.passes import kept_attention

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
        kept = None if dropout else kept_attention(q, k, v, causal=is_causal, scale=scaling)
        if kept is not None:
            return kept
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scaling)

    if count * max_length_q == total:

        def batched(packed: Tensor) -> Tensor:
            # squeeze, since the gradient of an index is zeros with a copy in them
            by_segment: Tensor = packed.squeeze(0).unflatten(1, (count, max_length_q))
            return by_segment.transpose(0, 1)

        out = attend(batched(query), batched(key), batched(value))
        return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _torch_varlen(query, key, value, cu_seq_lens_q, max_length_q, is_causal, scaling), None
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = zip(*(packed.split(lengths, dim=2) for packed in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v) for q, k, v in pieces], dim=2).transpose(1, 2), None


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_lengths: Tensor, longest: int, is_causal: bool, scaling: float
) -> Tensor:
    """Run torch's variable-length flash attention on `(1, heads, total, head_dim)` inputs."""
    from torch.nn.attention.varlen import varlen_attn  # a CUDA-only part of torch, imported where it is used

    q, k, v = (packed.squeeze(0).transpose(0, 1) for packed in (query, key, value))
    window = (-1, 0) if is_causal else (-1, -1)
    out = varlen_attn(q, k, v, cu_lengths, cu_lengths, longest, longest, scale=scaling, window_size=window)
    if not isinstance(out, Tensor):  # torch returns a tuple only when auxiliary outputs are asked for
        raise TypeError(f"torch's varlen_attn returned {type(out).__name__} where a tensor was expected")
    return out.unsqueeze(0)


def use_varlen_attention(tower: PreTrainedModel) -> None:
    """Let a vision tower that packs its images attend through `varlen_attention_forward`.

    Args:
        tower: a vision tower (e.g. `model.model.visual`) whose attention takes cumulative lengths.
    """
    AttentionInterface.register(VARLEN_ATTENTION, varlen_attention_forward)
    tower.config._attn_implementation = VARLEN_ATTENTION
