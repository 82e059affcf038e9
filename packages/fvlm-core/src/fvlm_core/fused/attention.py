"""Attention of the language models: query, key and value in one function, one rotation, the model's attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fvlm_core.decoding.stepping import is_stepping
from fvlm_core.fused.adapted import project
from fvlm_core.fused.cache import cache_in, updated
from fvlm_core.fused.segments import attend_within
from fvlm_kernels import rotary

_NEEDED = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention_unfit(module: nn.Module) -> str | None:
    """Say why an attention layer cannot be fused, or None."""
    missing = [name for name in _NEEDED if name not in module._modules]
    return f"has no {missing[0]}" if missing else None


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Any]:
    """Call the attention that the model's config names, as the replaced layers do.

    Args:
        module: the attention layer.
        q, k, v: ``(batch, heads, tokens, head_dim)``; k and v may have fewer heads.
        mask: as the model made it for that attention, or None.
        **kwargs: what else the interface takes.

    Returns:
        ``(batch, tokens, heads, head_dim)`` and the weights, or None for them.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    chosen = module.config._attn_implementation
    function = eager_attention if chosen in (None, "eager") else ALL_ATTENTION_FUNCTIONS[chosen]
    scaling = setting(module, ("scaling", "scale"))
    out: tuple[Tensor, Any] = function(module, q, k, v, mask, scaling=scaling, **kwargs)
    return out


def setting(module: nn.Module, names: tuple[str, ...], default: float = 1.0) -> float:
    """Return a number that attention layers keep, under the one of several names that this one uses."""
    return float(next((vars(module)[name] for name in names if name in vars(module)), default))


def dropout_of(module: nn.Module) -> float:
    """Return the probability of dropping an attention weight, in the mode that the layer is in."""
    return setting(module, ("attention_dropout", "dropout"), 0.0) if module.training else 0.0


def eager_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention by two matrix products with the softmax in fp32, returning its weights; transformers' eager form."""
    import torch

    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, v).transpose(1, 2).contiguous(), weights


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    packed_starts: Tensor | None = None,
    packed_longest: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend as the layers of the Llama kind do, with or without norms on the heads of queries and keys.

    Args:
        module: the attention layer.
        hidden_states: ``(batch, tokens, hidden)``.
        attention_mask: as the model made it, or None.
        position_ids: passed on to the attention.
        position_embeddings: cosines and sines ``(batch, tokens, head_dim)``.
        packed_starts: where the samples of one packed row start (`fvlm_core.fused.segments`), instead of a mask.
        packed_longest: with it, a number of tokens that no sample has more of.
        **kwargs: the cache, and what is passed on to the attention.

    Returns:
        ``(batch, tokens, hidden)`` and the attention weights, or None for them.
    """
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    made = project(hidden_states, (module.q_proj, module.k_proj, module.v_proj), module.training)
    q, k, v = (x.view(shape) for x in made)
    if "q_norm" in module._modules:
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if position_embeddings is None:
        raise TypeError("position_embeddings is missing; the language model makes it and hands it to every layer")
    q, k = rotary(q, k, *position_embeddings)
    cache = cache_in(kwargs)
    if cache is not None:
        k, v = updated(cache, k, v, module.layer_idx, kwargs)
    if "sliding_window" in vars(module):
        kwargs["sliding_window"] = module.sliding_window
    weights: Any = None
    scale = setting(module, ("scaling", "scale"))
    if is_stepping(cache):
        out = cache.attend(q, module.layer_idx, scale, kwargs.get("sliding_window"))
    elif packed_starts is not None and packed_longest is not None:
        out = attend_within(q, k, v, packed_starts, packed_longest, scale)
    else:
        dropout = dropout_of(module)
        out, weights = attend(module, q, k, v, attention_mask, dropout=dropout, position_ids=position_ids, **kwargs)
    out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
    (out,) = project(out, (module.o_proj,), module.training)
    return out, weights


def config_window_attention_forward(module: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
    """Attend as Mistral does, whose layers read the sliding window from the config; see `attention_forward`."""
    return attention_forward(module, hidden_states, sliding_window=module.config.sliding_window, **kwargs)


def cross_attention_forward(
    module: Any,
    hidden_states: Tensor,
    cross_attention_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend from text to image features as Llama 3.2 Vision does.

    Args:
        module: the attention layer.
        hidden_states: ``(batch, tokens, hidden)``.
        cross_attention_states: what the vision tower found, ``(batch · images · tiles, patches, hidden)``; None: keys
            and values are in the cache.
        attention_mask: which image tokens a text token sees, as the model made it.
        use_cache: not read, as in the class; the attention does not get it.
        **kwargs: the cache, and what is passed on to the attention.

    Returns:
        ``(batch, tokens, hidden)`` and the attention weights, or None for them.

    Raises:
        ValueError: there are neither states nor cached keys.
    """
    rows, cache = hidden_states.shape[0], cache_in(kwargs)
    (q,) = project(hidden_states, (module.q_proj,), module.training)
    q = module.q_norm(q.view(rows, -1, module.num_heads, module.head_dim)).transpose(1, 2)
    if cross_attention_states is not None:
        made = project(cross_attention_states, (module.k_proj, module.v_proj), module.training)
        k, v = (x.reshape(rows, -1, module.num_key_value_heads, module.head_dim) for x in made)
        k, v = module.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = updated(cache, k, v, module.layer_idx, kwargs)
    elif cache is not None and cache.get_seq_length() > 0:
        cached = cache.layers[module.layer_idx]
        k, v = cached.keys, cached.values
    else:
        raise ValueError("cross attention got neither cross_attention_states nor a cache that holds their keys")
    if is_stepping(cache):
        out, weights = cache.attend_across(q, module.layer_idx, module.scaling, attention_mask), None
    else:
        out, weights = attend(module, q, k, v, attention_mask, dropout=dropout_of(module), **kwargs)
    out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
    (out,) = project(out, (module.o_proj,), module.training)
    return out, weights
