"""Llama 3.2 Vision: tiles through local, then global vision layers; some text layers attend to the image.

The cross-attention layers are text layers: they lie among them and work on text states, so they belong to the language
tower. The gated global layers belong to the vision tower and run after the local ones.

In 16 bit stay the projector (one linear that every image passes through) and the head, whose rounding goes straight
into the loss. The gates of the cross-attention and global layers are single parameters, no linears: no 4- or 8-bit
loading touches them.
"""

from __future__ import annotations

from fvlm_core.arch.facts import ArchFacts, MediaTokens

FACTS = ArchFacts(
    model_type="mllama",
    vision=("model.vision_model",),
    projector=("model.multi_modal_projector",),
    language=("model.language_model",),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
    layers={
        "vision": ("model.vision_model.transformer.layers", "model.vision_model.global_transformer.layers"),
        "language": ("model.language_model.layers",),
    },
    unquantized=("model.multi_modal_projector", "lm_head"),
    media=MediaTokens(image=("image_token_index",)),
    fused={
        "MllamaForConditionalGeneration": "task_model",
        "MllamaTextModel": "text_model",
        "MllamaSelfAttentionDecoderLayer": "decoder_layer",
        "MllamaTextSelfAttention": "attention",
        "MllamaCrossAttentionDecoderLayer": "cross_layer",
        "MllamaTextCrossAttention": "cross_attention",
        "MllamaTextMLP": "gated_mlp",
        "MllamaTextRMSNorm": "rms_norm",
        "MllamaVisionModel": "tiled_tower",
        "MllamaVisionEncoder": "checkpointed_encoder",
        "MllamaVisionEncoderLayer": "tower_block",
        "MllamaVisionAttention": "tower_attention",
        "MllamaVisionMLP": "plain_mlp",
        "Conv2d": "patch_conv",
    },
    turns=(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
)
