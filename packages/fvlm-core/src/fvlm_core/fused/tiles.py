"""The vision tower of Llama 3.2, whose images are tiles in a row, without a mask of patches by patches.

A row holds as many tiles as the largest image has, each filled up to a multiple of eight patches. Two patches that are
filling, or of a tile that is, do not see each other; all other pairs do. Stock says so by a mask, (images, 1, patches,
patches), for which PyTorch has its slowest attention only. Here the layers get which patches are filling, and see to it
by one channel more in each head (`kept_apart`), so that any attention without a mask computes the same.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from fvlm_core.fused.kinds import kind_of

_WIDTHS = 16
"""Heads are widened to a multiple of this: what attention kernels compute with anyway."""
_APART = 2048.0
"""Its square is what is taken from the score of a pair that must not see each other: no weight is left of that."""


def kept_apart(q: Tensor, k: Tensor, v: Tensor, filling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widen heads so that of two tokens that are filling, neither sees the other, nor itself.

    In the first new channel queries that are filling hold a number, and keys its negative; everything else that is new
    is 0. So the score of such a pair falls by the number's square, and that of every other pair by exactly nothing.

    Args:
        q: ``(batch, tokens, heads, head_dim)``.
        k: like `q`.
        v: like `q`.
        filling: ``(batch, tokens)`` bool; of each row some tokens are not.

    Returns:
        Query, key and value of more channels; of what they attend to, the first ``head_dim`` channels are the result.
    """
    more = _WIDTHS - q.shape[-1] % _WIDTHS
    marks = q.new_zeros(*filling.shape, 1, more)
    marks[..., 0, 0] = filling * _APART
    wide = (*q.shape[:-1], more)
    return (
        torch.cat((q, marks.expand(wide)), dim=-1),
        torch.cat((k, -marks.expand(wide)), dim=-1),
        pad(v, (0, more)),
    )


def tiled_tower_forward(
    module: Any, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor, **kwargs: Any
) -> Any:
    """Run a tower of Llama 3.2 Vision without its mask, keeping of the layers' results those that are wanted.

    Stock holds what comes out of all forty layers until the last one is done. The class's own forward runs where the
    attention is not SDPA, where hidden states or attention weights are asked for, and where a layer is not fused.

    Args:
        module: the tower.
        pixel_values: ``(batch, images, tiles, channels, height, width)``.
        aspect_ratio_ids: ``(batch, images)``, how an image's tiles lie; 0: there is no image.
        aspect_ratio_mask: ``(batch, images, tiles)``, 0 for tiles that are filling.
        **kwargs: what the class takes beside it.

    Returns:
        The states of all tiles' patches, those of the last layer and of the intermediate ones side by side, ``(batch,
        images, tiles, patches, channels)``; under autocast in its dtype, in which the projector reads them.
    """
    fill = -module.num_patches % 8
    if not fill or not _fits(module, kwargs):
        return type(module).forward(module, pixel_values, aspect_ratio_ids, aspect_ratio_mask, **kwargs)
    batch, images, tiles = pixel_values.shape[:3]
    ids = aspect_ratio_ids.reshape(batch * images, 1)
    x = pad(_embedded(module, pixel_values, ids), (0, 0, 0, fill))  # (images, tiles, patches, width)
    filled = x.shape[:3]
    filling = torch.arange(filled[2], device=x.device) >= module.num_patches
    filling = (filling | (aspect_ratio_mask.reshape(-1, tiles, 1) == 0)).flatten(1)
    places = [place % len(module.transformer.layers) for place in module.intermediate_layers_indices]
    local = module.transformer(x.flatten(1, 2), filling=filling, wanted=places)
    x = module.layernorm_post(local.last_hidden_state)
    x = module.post_tile_positional_embedding(x.unflatten(1, filled[1:]), ids).flatten(1, 2)
    x = module.global_transformer(x, filling=filling, wanted=()).last_hidden_state

    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def trimmed(states: Tensor) -> Tensor:
        kept: Tensor = states.unflatten(1, filled[1:])[:, :, : module.num_patches]
        return kept.to(dtype)

    between = torch.stack([trimmed(local.hidden_states[place]) for place in places], dim=-1).flatten(-2)
    out = torch.cat([trimmed(x), between], dim=-1)
    return BaseModelOutput(last_hidden_state=out.unflatten(0, (batch, images)))


def _embedded(module: Any, pixel_values: Tensor, ids: Tensor) -> Tensor:
    """Return what goes into the tower's layers, ``(images, tiles, patches, width)``."""
    tiles = pixel_values.shape[2]
    weight = module.patch_embedding.weight
    x = module.patch_embedding(pixel_values.flatten(0, 2).to(weight.device, weight.dtype)).flatten(2).transpose(1, 2)
    x = module.pre_tile_positional_embedding(x.unflatten(0, (-1, tiles)), ids)
    x = module.apply_class_embedding(x.flatten(0, 1)).unflatten(0, (-1, tiles))
    embedded: Tensor = module.layernorm_pre(module.gated_positional_embedding(x, ids))
    return embedded


def _fits(module: Any, kwargs: dict[str, Any]) -> bool:
    config, encoders = module.config, (module.transformer, module.global_transformer)
    return (
        config._attn_implementation == "sdpa"
        and all(value is None for value in kwargs.values())
        and not (config.output_hidden_states or config.output_attentions)
        and all(kind_of(encoder) == "checkpointed_encoder" for encoder in encoders)
        and all(
            kind_of(layer) == "tower_block" and kind_of(layer.self_attn) == "tower_attention"
            for encoder in encoders
            for layer in encoder.layers
        )
    )


def checkpointed_encoder_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    filling: Tensor | None = None,
    wanted: Collection[int] | None = None,
) -> BaseModelOutput:
    """Run the layers of an encoder of Llama 3.2 Vision, under gradient checkpointing where that is on.

    Transformers tells the encoder about checkpointing, but its layers do not listen, so that a trained tower keeps all
    activations of all tiles.

    Args:
        module: the encoder.
        hidden_states: ``(images, tiles · patches, hidden)``.
        attention_mask: which patches see each other, additive; None: `filling` says it, or all do.
        filling: ``(images, tiles · patches)``, which patches do not see each other.
        wanted: of which layers the output holds what comes out of them, the others being None there; None: of all.

    Returns:
        What comes out of each layer, as ``hidden_states``, and of the last.
    """
    states: list[Tensor | None] = []
    seen = {"attention_mask": attention_mask} if filling is None else {"filling": filling}
    for place, layer in enumerate(module.layers):
        call = partial(layer.__call__, **seen)
        if module.gradient_checkpointing and module.training:
            hidden_states = module._gradient_checkpointing_func(call, hidden_states)
        else:
            hidden_states = call(hidden_states)
        states.append(hidden_states if wanted is None or place in wanted else None)
    return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=tuple(states))  # type: ignore[arg-type]
