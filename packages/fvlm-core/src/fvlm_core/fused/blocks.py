"""Whole blocks: norm, attention, residual addition and norm in one launch, MLP, residual addition."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fvlm_core.fused.norms import add_and_normalize, normalized
from fvlm_core.passes import add_last

CROSS_ATTENTION_ALONE = ("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask")
"""Arguments that Llama 3.2 Vision hands to every text layer, and that its layers of self-attention do not read."""
_TOWER_PARTS = (
    ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("attention_norm", "attention", "ffn_norm", "feed_forward"),
)


def decoder_layer_forward(module: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Run a decoder layer of the Llama kind on ``(batch, tokens, hidden)``; the rest goes to its attention."""
    for name in CROSS_ATTENTION_ALONE:
        kwargs.pop(name, None)
    attended, _ = module.self_attn(hidden_states=normalized(module.input_layernorm, hidden_states), **kwargs)
    normed, residual = add_and_normalize(module.post_attention_layernorm, attended, hidden_states)
    return add_last(residual, module.mlp, normed)


def sandwich_layer_forward(module: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Run a decoder layer of Gemma 3, with norms before and behind both parts, on ``(batch, tokens, hidden)``."""
    attended, _ = module.self_attn(hidden_states=normalized(module.input_layernorm, hidden_states), **kwargs)
    attended = normalized(module.post_attention_layernorm, attended)
    normed, residual = add_and_normalize(module.pre_feedforward_layernorm, attended, hidden_states)
    return residual + normalized(module.post_feedforward_layernorm, module.mlp(normed))


def cross_layer_forward(
    module: Any,
    hidden_states: Tensor,
    cross_attention_states: Tensor | None = None,
    cross_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    full_text_row_masked_out_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Run a layer of Llama 3.2 Vision whose text attends to the image.

    Args:
        module: the layer.
        hidden_states: ``(batch, tokens, hidden)``.
        cross_attention_states: see `cross_attention_forward`.
        cross_attention_mask: which image tokens a text token sees.
        attention_mask: not read, as are all that follow but the next: they are for layers of self-attention.
        full_text_row_masked_out_mask: ``(batch, 1, tokens, 1)``, 0 for tokens that see no image, or None.
        position_ids: not read.
        use_cache: not read.
        position_embeddings: not read.
        **kwargs: the cache, and what else is passed on to the attention.

    Returns:
        ``(batch, tokens, hidden)``.
    """
    attended, _ = module.cross_attn(
        hidden_states=normalized(module.input_layernorm, hidden_states),
        attention_mask=cross_attention_mask,
        cross_attention_states=cross_attention_states,
        **kwargs,
    )
    attended = _gated(module, "cross_attn_attn_gate", attended)
    normed, residual = add_and_normalize(module.post_attention_layernorm, attended, hidden_states)
    out: Tensor = module.mlp(normed)
    if full_text_row_masked_out_mask is not None:
        out = full_text_row_masked_out_mask[:, 0] * out
    return residual + _gated(module, "cross_attn_mlp_gate", out)


def tower_block_forward(
    module: Any,
    hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    hidden_state: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run a block of a SigLIP, Pixtral or Llama 3.2 tower, gated or not.

    Args:
        module: the block.
        hidden_states: ``(batch, patches, hidden)``.
        attention_mask: as the tower made it, or None.
        hidden_state: the older name of ``hidden_states``, which Llama 3.2's own encoder uses.
        **kwargs: passed on to the attention.

    Returns:
        ``(batch, patches, hidden)``.

    Raises:
        TypeError: there is no hidden state.
    """
    x = hidden_state if hidden_states is None else hidden_states
    if x is None:
        raise TypeError("hidden_states is missing; the vision tower hands it to every block")
    names = next(parts for parts in _TOWER_PARTS if all(name in module._modules for name in parts))
    first, attention, second, mlp = (module._modules[name] for name in names)
    attended, _ = attention(normalized(first, x), attention_mask=attention_mask, **kwargs)
    normed, residual = add_and_normalize(second, _gated(module, "gate_attn", attended), x)
    if "gate_ffn" in module._parameters:
        return residual + _gated(module, "gate_ffn", mlp(normed))
    return add_last(residual, mlp, normed)


def tower_block_unfit(module: nn.Module) -> str | None:
    """Say why a vision block cannot be fused, or None."""
    known = any(all(name in module._modules for name in parts) for parts in _TOWER_PARTS)
    return None if known else "has parts of other names"


def _gated(module: nn.Module, name: str, x: Tensor) -> Tensor:
    gate = module._parameters.get(name)
    return x if gate is None else gate.tanh() * x


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
    return add_last(residual, module.mlp, normed)
