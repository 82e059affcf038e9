"""Whole blocks: norm, attention, residual addition and norm in one launch, MLP, residual addition."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fvlm_core.fused.norms import add_and_normalize, normalized


def decoder_layer_forward(module: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Run a decoder layer of the Llama kind on ``(batch, tokens, hidden)``; the rest goes to its attention."""
    attended, _ = module.self_attn(hidden_states=normalized(module.input_layernorm, hidden_states), **kwargs)
    normed, residual = add_and_normalize(module.post_attention_layernorm, attended, hidden_states)
    out: Tensor = module.mlp(normed)
    return residual + out


def vision_block_forward(
    module: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run a block of a Qwen vision tower on ``(patches, hidden)``."""
    attended = module.attn(
        normalized(module.norm1, hidden_states),
        cu_seqlens=cu_seqlens,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    normed, residual = add_and_normalize(module.norm2, attended, hidden_states)
    out: Tensor = module.mlp(normed)
    return residual + out
