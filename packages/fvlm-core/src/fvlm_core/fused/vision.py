"""Self-attention of vision towers that pack the patches of all images into one row (the Qwen-VL families)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvlm_core.fused.adapted import project
from fvlm_core.fused.attention import attend, dropout_of
from fvlm_kernels import packed_vision_rotary


def vision_attention_forward(
    module: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attend within each image or window.

    Args:
        module: the attention layer.
        hidden_states: ``(patches, hidden)``.
        cu_seqlens: ``(segments + 1,)`` int32, where each segment starts, and the total.
        position_embeddings: cosines and sines ``(patches, head_dim)``.
        max_seqlen: length of the longest segment, where the collator computed it.
        **kwargs: passed on to the attention.

    Returns:
        ``(patches, hidden)``.
    """
    total = hidden_states.shape[0]
    (qkv,) = project(hidden_states, (module.qkv,), module.training)
    if position_embeddings is None:
        raise TypeError("position_embeddings is missing; the vision tower makes it and hands it to every block")
    q, k, v = packed_vision_rotary(qkv.view(total, 3, module.num_heads, -1), *position_embeddings)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    dropout = dropout_of(module)
    if "flash" in (module.config._attn_implementation or ""):
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        out, _ = attend(
            module,
            q,
            k,
            v,
            None,
            dropout=dropout,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=max_seqlen,
            max_length_k=max_seqlen,
            is_causal=False,
            **kwargs,
        )
    else:
        lengths = cu_seqlens.diff().tolist()
        pieces = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        each = [attend(module, a, b, c, None, dropout=dropout, is_causal=False, **kwargs)[0] for a, b, c in pieces]
        out = torch.cat(each, dim=1)
    (out,) = project(out.reshape(total, -1).contiguous(), (module.proj,), module.training)
    return out
