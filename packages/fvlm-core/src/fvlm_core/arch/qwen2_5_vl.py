"""Qwen2.5-VL: as Qwen2-VL, with a gated MLP and windowed attention in the vision blocks.

In 16 bit stay the merger and the head, for the reasons given in qwen2_vl.
"""

from __future__ import annotations

from fvlm_core.arch.facts import ArchFacts, MediaTokens

FACTS = ArchFacts(
    model_type="qwen2_5_vl",
    vision=("model.visual",),
    projector=("model.visual.merger",),
    language=("model.language_model",),
    attention=("attn.qkv", "attn.proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    layers={"vision": ("model.visual.blocks",), "language": ("model.language_model.layers",)},
    unquantized=("model.visual.merger", "lm_head"),
    media=MediaTokens(
        image=("image_token_id",),
        video=("video_token_id",),
        framing=("vision_start_token_id", "vision_end_token_id"),
    ),
)
