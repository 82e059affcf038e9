"""Text models without a mask to make: nothing is asked of the device about the rows.

Where it is given no mask, transformers looks through the positions for samples that are packed into a row, and waits
for the answer. Where the layers are fused and causal a batch without a mask holds none (or says where they start), so
the layers can be run one after another. Qwen3-VL's image features of several depths are added on the way, where stock
asks twice a layer which tokens they belong to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from fvlm_core.fused.cache import NAMES
from fvlm_core.fused.kinds import kind_of
from fvlm_core.fused.segments import PACKED_STARTS

DEEP_ROWS = "deep_rows"
"""Argument of a text model: ``(features,)`` int64, the flat indices of the tokens that get features of each depth."""
DEEP_FEATURES = "deepstack_visual_embeds"
_CAUSAL_KINDS = ("decoder_layer", "cross_layer")
_OWN = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "return_dict",
    DEEP_FEATURES,
    "visual_pos_masks",
)


def text_model_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a text model; as its class does unless its layers need no mask and fill no cache.

    Args:
        module: the text model.
        *args: none, as the models call it.
        **kwargs: as its class takes them, and `DEEP_ROWS` beside the features of several depths.
    """
    rows: Tensor | None = kwargs.pop(DEEP_ROWS, None)
    if args or not _needs_no_mask(module, kwargs):
        return _as_stock(module, args, kwargs, rows)
    hidden = kwargs.get("inputs_embeds")
    hidden = module.embed_tokens(kwargs["input_ids"]) if hidden is None else hidden
    told, positions = _positions(hidden, kwargs.get("position_ids"), several_axes=DEEP_FEATURES in kwargs)
    deep = kwargs.get(DEEP_FEATURES) or ()
    tables = module.rotary_emb(hidden, position_ids=positions)
    rest = {name: value for name, value in kwargs.items() if name not in _OWN}
    mask = kwargs.get("attention_mask")
    for depth, layer in enumerate(module.layers):
        if kind_of(layer) == "cross_layer" and kwargs.get("cross_attention_states") is None:
            continue
        hidden = layer(hidden, attention_mask=mask, position_ids=told, position_embeddings=tables, **rest)
        if rows is not None and depth < len(deep):
            features = deep[depth].to(hidden.device, hidden.dtype)
            hidden = hidden.flatten(0, 1).index_add(0, rows, features).view_as(hidden)
    return BaseModelOutputWithPast(last_hidden_state=module.norm(hidden))


def _positions(hidden: Tensor, given: Tensor | None, several_axes: bool) -> tuple[Tensor | None, Tensor]:
    """Return the positions that layers are told, and those of the rotary tables: ``([axes,] batch, tokens)``."""
    if given is None:
        counted = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return counted, counted.expand(3, hidden.shape[0], -1) if several_axes else counted
    if given.dim() < 3:
        return given, given
    return (given[0], given[1:]) if given.shape[0] == 4 else (None, given)


def _needs_no_mask(module: Any, kwargs: dict[str, Any]) -> bool:
    config, mask, positions = module.config, kwargs.get("attention_mask"), kwargs.get("position_ids")
    packed = kwargs.get(PACKED_STARTS) is not None
    tokens = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    window = config.to_dict().get("sliding_window")
    return (
        (mask is None or (packed and mask.dim() == 4))
        and (positions is None or packed or (positions.dim() == 3 and positions.shape[0] == 3))
        and all(kwargs.get(name) is None for name in NAMES)
        and not _fills_cache(module, kwargs.get("use_cache"))
        and kwargs.get("visual_pos_masks") is None
        and kwargs.get("return_dict") is not False
        and not any(kwargs.get(name, vars(config).get(name)) for name in ("output_hidden_states", "output_attentions"))
        and config._attn_implementation == "sdpa"
        and tokens is not None
        and (window is None or tokens.shape[1] <= window)
        and all(kind_of(layer) in _CAUSAL_KINDS for layer in module.layers)
    )


def _fills_cache(module: Any, asked: bool | None) -> bool:
    """Whether its class would fill a cache: not while it checkpoints, whatever it is asked."""
    if module.training and module.gradient_checkpointing:
        return False
    return bool(module.config.use_cache if asked is None else asked)


def _as_stock(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor | None) -> Any:
    if rows is not None:
        embeds: Tensor = kwargs["inputs_embeds"]
        places = torch.zeros(embeds.shape[:2].numel(), dtype=torch.bool, device=embeds.device)
        kwargs["visual_pos_masks"] = places.index_fill(0, rows, True).view(embeds.shape[:2])
    return type(module).forward(module, *args, **kwargs)
