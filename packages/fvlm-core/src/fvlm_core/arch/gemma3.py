"""Gemma 3 (4B and up): a SigLIP tower, pooling to 256 tokens an image, a text model with sliding windows.

In 16 bit stays the head, whose rounding goes straight into the loss and which is tied to the embedding. The projector
is a bare matrix (``mm_input_projection_weight``), no linear layer: no 4- or 8-bit loading touches it, and LoRA cannot
wrap it.
"""

from __future__ import annotations

from fvlm_core.arch.facts import ArchFacts, MediaTokens

FACTS = ArchFacts(
    model_type="gemma3",
    vision=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language=("model.language_model",),
    attention=("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    mlp=("fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
    layers={
        "vision": ("model.vision_tower.encoder.layers",),
        "language": ("model.language_model.layers",),
    },
    unquantized=("lm_head",),
    beyond_float16=True,
    media=MediaTokens(
        image=("image_token_index",),
        framing=("boi_token_index", "eoi_token_index"),
    ),
    fused={
        "Gemma3ForConditionalGeneration": "gemma_task_model",
        "Gemma3Model": "pooled_media_model",
        "Gemma3DecoderLayer": "sandwich_layer",
        "Gemma3Attention": "attention",
        "Gemma3MLP": "gated_mlp",
        "Gemma3RMSNorm": "gemma_rms_norm",
        "SiglipEncoderLayer": "tower_block",
        "SiglipAttention": "tower_attention",
        "SiglipMLP": "plain_mlp",
        "Conv2d": "patch_conv",
    },
    turns=("<start_of_turn>user\n", "<start_of_turn>model\n"),
)
