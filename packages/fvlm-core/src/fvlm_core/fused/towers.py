"""Vision towers whose blocks get rows of patches: SigLIP, Pixtral and, as far as attention goes, Llama 3.2 Vision."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fvlm_core.attention import varlen_attention_forward
from fvlm_core.fused.adapted import project
from fvlm_core.fused.attention import attend, dropout_of, setting
from fvlm_core.fused.kinds import kind_of
from fvlm_core.fused.tiles import kept_apart
from fvlm_core.passes import quick_attention
from fvlm_kernels import rotary


def tower_attention_unfit(module: nn.Module) -> str | None:
    """Say why an attention layer of a vision tower cannot be fused, or None."""
    missing = [name for name in ("q_proj", "k_proj", "v_proj") if name not in module._modules]
    return f"has no {missing[0]}" if missing else None


def tower_attention_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    segments: Tensor | None = None,
    longest: int | None = None,
    filling: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend among the patches of a row.

    Args:
        module: the attention layer.
        hidden_states: ``(batch, patches, hidden)``.
        attention_mask: as the tower made it, or None.
        position_embeddings: cosines and sines ``(patches, head_dim)``; None: the tower does not rotate.
        segments: ``(images + 1,)`` int32, where each image of the one row starts, and the total; None: attend among
            all patches, as far as the mask allows.
        longest: patches of the largest image, with ``segments``.
        filling: ``(batch, patches)`` bool, which patches do not see each other (`fvlm_core.fused.tiles`); it stands in
            the place of a mask.
        **kwargs: passed on to the attention.

    Returns:
        ``(batch, patches, hidden)`` and the attention weights, or None for them.
    """
    shape = (*hidden_states.shape[:-1], module.num_heads, module.head_dim)
    made = project(hidden_states, (module.q_proj, module.k_proj, module.v_proj), module.training)
    q, k, v = (x.view(shape) for x in made)
    if filling is not None:
        q, k, v = kept_apart(q, k, v, filling)
        kwargs["is_causal"] = False  # what transformers' attention takes for granted without a mask
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if position_embeddings is not None:
        q, k = rotary(q, k, *position_embeddings)
    dropout = dropout_of(module)
    weights: Any = None
    quick = _quick(module, q, k, v, dropout) if segments is None and attention_mask is None else None
    if quick is not None:
        out = quick.transpose(1, 2)
    elif segments is None:
        out, weights = attend(module, q, k, v, attention_mask, dropout=dropout, **kwargs)
    else:
        out, _ = varlen_attention_forward(
            module, q, k, v, None, module.scaling, dropout, cu_seq_lens_q=segments, max_length_q=longest
        )
    out = out[..., : module.head_dim]
    last = module.out_proj if "out_proj" in module._modules else module.o_proj
    (out,) = project(out.reshape(*hidden_states.shape[:-1], -1).contiguous(), (last,), module.training)
    return out, weights


def _quick(module: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor | None:
    if dropout or module.config._attn_implementation != "sdpa":
        return None
    return quick_attention(q, k, v, causal=False, scale=setting(module, ("scaling", "scale")))


def packed_tower_forward(
    module: Any, pixel_values: Tensor, image_sizes: Any = None, output_hidden_states: Any = None, **kwargs: Any
) -> Any:
    """Run a Pixtral tower, whose images form one row of patches, without a mask of patches by patches.

    Stock makes that mask for all but flash attention: 512 MiB in 16 bit for four images of 1024 × 1024 pixels. Here the
    layers get the bounds of the images instead. The class's own forward runs where the attention is not SDPA, where
    attention weights are asked for, and where a layer is not fused.

    Args:
        module: the tower.
        pixel_values: ``(images, channels, height, width)``, padded to the largest image.
        image_sizes: ``(images, 2)``, height and width of each image in pixels; None: they are not padded.
        output_hidden_states: whether the output holds what goes into the first layer and comes out of every one; or,
            in newer transformers, the places among these of those that are wanted, the others being None.
        **kwargs: passed on to the layers.

    Returns:
        The states of all patches, ``(1, patches, hidden)``.
    """
    if not _can_pack(module, output_hidden_states, kwargs):
        if output_hidden_states is not None:
            kwargs["output_hidden_states"] = output_hidden_states
        return type(module).forward(module, pixel_values, image_sizes, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("return_dict", "output_attentions")}
    sizes = _sizes_in_patches(pixel_values, image_sizes, module.patch_size)
    embedded = module.patch_conv(pixel_values.to(dtype=module.patch_conv.weight.dtype))
    rows = [image[:, :high, :wide].flatten(1).T for image, (high, wide) in zip(embedded, sizes, strict=True)]
    hidden = module.ln_pre(torch.cat(rows).unsqueeze(0))
    positions = _positions(module, sizes).to(hidden.device, non_blocking=True)
    lengths = [high * wide for high, wide in sizes]
    segments = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(hidden.device, non_blocking=True)
    tables = module.patch_positional_embedding(hidden, positions)
    layers = module.transformer.layers
    wanted = _wanted_states(output_hidden_states, len(layers) + 1)
    states = [hidden if 0 in wanted else None]
    for place, layer in enumerate(layers, start=1):
        hidden = layer(hidden, position_embeddings=tables, segments=segments, longest=max(lengths), **kwargs)
        states.append(hidden if place in wanted else None)
    found: Any = tuple(states) if wanted else None
    return BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=found)


def _wanted_states(asked: Any, count: int) -> set[int]:
    """Return which of a tower's hidden states its output holds; a negative place counts from the last."""
    if asked is None or isinstance(asked, bool):
        return set(range(count)) if asked else set()
    places = [asked] if isinstance(asked, int) else asked
    return {place % count for place in places if -count <= place < count}


def _can_pack(module: Any, output_hidden_states: Any, kwargs: dict[str, Any]) -> bool:
    config = module.config
    return (
        config._attn_implementation == "sdpa"
        and isinstance(output_hidden_states, bool | int | list | tuple | None)
        and not (config.output_hidden_states and output_hidden_states is None)
        and not kwargs.get("output_attentions", config.output_attentions)
        and kwargs.get("return_dict") is not False
        and all(_takes_segments(layer) for layer in module.transformer.layers)
    )


def _takes_segments(layer: Any) -> bool:
    return kind_of(layer) == "tower_block" and kind_of(layer.attention) == "tower_attention"


def _sizes_in_patches(pixel_values: Tensor, image_sizes: Any, patch: int) -> list[tuple[int, int]]:
    if image_sizes is None:
        image_sizes = [pixel_values.shape[-2:]] * pixel_values.shape[0]
    elif isinstance(image_sizes, Tensor):
        image_sizes = image_sizes.tolist()
    return [(int(height) // patch, int(width) // patch) for height, width in image_sizes]


def _positions(module: Any, sizes: list[tuple[int, int]]) -> Tensor:
    """Return row and column of every patch, ``(patches, 2)``; for older transformers as one number, ``(patches,)``."""
    places: Tensor = torch.cat([torch.cartesian_prod(torch.arange(high), torch.arange(wide)) for high, wide in sizes])
    if module.patch_positional_embedding.rope_type == "axial":
        return places
    wide: int = module.config.image_size // module.patch_size
    return places[:, 0] * wide + places[:, 1]
