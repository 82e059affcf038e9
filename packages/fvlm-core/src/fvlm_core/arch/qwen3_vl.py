"""Qwen3-VL: some vision blocks feed the first text layers (deepstack), each through a merger of its own.

In 16 bit stay all mergers and the head, for the reasons given in qwen2_vl.
"""

from __future__ import annotations

from fvlm_core.arch.facts import ArchFacts, MediaTokens

FACTS = ArchFacts(
    model_type="qwen3_vl",
    vision=("model.visual",),
    projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    language=("model.language_model",),
    attention=("attn.qkv", "attn.proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("mlp.linear_fc1", "mlp.linear_fc2", "gate_proj", "up_proj", "down_proj"),
    layers={"vision": ("model.visual.blocks",), "language": ("model.language_model.layers",)},
    unquantized=("model.visual.merger", "model.visual.deepstack_merger_list", "lm_head"),
    media=MediaTokens(
        image=("image_token_id",),
        video=("video_token_id",),
        framing=("vision_start_token_id", "vision_end_token_id"),
    ),
)
