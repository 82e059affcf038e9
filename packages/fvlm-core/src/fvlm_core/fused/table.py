"""The kinds of fused layers: what runs in a module's place, and whether it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fvlm_core.fused import attention, blocks, head, media, mlp, norms, patches, texts, tiles, towers, vision

if TYPE_CHECKING:
    from torch import nn


def _always(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class FusedLayer:
    """A forward that can take the place of a module's own.

    Attributes:
        forward: a function of the module and its arguments, to be bound to the module.
        unfit: says why it cannot serve a module, or None where it can.
    """

    forward: Callable[..., Any]
    unfit: Callable[[nn.Module], str | None] = _always


LAYERS: dict[str, FusedLayer] = {
    "rms_norm": FusedLayer(norms.rms_norm_forward),
    "gemma_rms_norm": FusedLayer(norms.gemma_rms_norm_forward),
    "gated_mlp": FusedLayer(mlp.gated_forward, mlp.gated_unfit),
    "plain_mlp": FusedLayer(mlp.plain_forward, mlp.plain_unfit),
    "attention": FusedLayer(attention.attention_forward, attention.attention_unfit),
    "config_window_attention": FusedLayer(attention.config_window_attention_forward, attention.attention_unfit),
    "cross_attention": FusedLayer(attention.cross_attention_forward, attention.attention_unfit),
    "decoder_layer": FusedLayer(blocks.decoder_layer_forward),
    "sandwich_layer": FusedLayer(blocks.sandwich_layer_forward),
    "cross_layer": FusedLayer(blocks.cross_layer_forward),
    "vision_attention": FusedLayer(vision.vision_attention_forward),
    "vision_block": FusedLayer(blocks.vision_block_forward),
    "tower_attention": FusedLayer(towers.tower_attention_forward, towers.tower_attention_unfit),
    "tower_block": FusedLayer(blocks.tower_block_forward, blocks.tower_block_unfit),
    "checkpointed_encoder": FusedLayer(tiles.checkpointed_encoder_forward),
    "tiled_tower": FusedLayer(tiles.tiled_tower_forward),
    "packed_tower": FusedLayer(towers.packed_tower_forward),
    "patch_embed": FusedLayer(patches.patch_embed_forward),
    "patch_conv": FusedLayer(patches.patch_conv_forward, patches.patch_conv_unfit),
    "merging_projector": FusedLayer(mlp.merging_projector_forward, mlp.plain_unfit),
    "media_model": FusedLayer(media.media_model_forward),
    "deep_media_model": FusedLayer(media.deep_media_model_forward),
    "pooled_media_model": FusedLayer(media.pooled_media_model_forward),
    "sized_media_model": FusedLayer(media.sized_media_model_forward),
    "text_model": FusedLayer(texts.text_model_forward),
    "task_model": FusedLayer(head.task_model_forward, head.task_model_unfit),
    "gemma_task_model": FusedLayer(head.task_model_forward, head.gemma_task_model_unfit),
}
"""Kind → layer; the values of ``ArchFacts.fused`` are these names."""
