"""The fused layers of what Pixtral and Mistral 3 share: the Pixtral tower and the Mistral text model."""

from __future__ import annotations

PIXTRAL = {
    "PixtralVisionModel": "packed_tower",
    "PixtralAttentionLayer": "tower_block",
    "PixtralAttention": "tower_attention",
    "PixtralMLP": "gated_mlp",
    "PixtralRMSNorm": "rms_norm",
    "Conv2d": "patch_conv",
}
MISTRAL = {
    "MistralModel": "text_model",
    "MistralDecoderLayer": "decoder_layer",
    "MistralAttention": "config_window_attention",
    "MistralMLP": "gated_mlp",
    "MistralRMSNorm": "rms_norm",
}
