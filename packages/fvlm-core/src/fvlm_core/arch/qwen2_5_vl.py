"""Qwen2.5-VL: as Qwen2-VL, with a gated MLP and windowed attention in the vision blocks.

In 16 bit stay the merger and the head, for the reasons given in qwen2_vl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fvlm_core.arch.facts import CHATML_TURNS, ArchFacts, MediaTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fvlm_core.batch_plan import QwenPlanner


def _planner(model: PreTrainedModel) -> QwenPlanner:
    from fvlm_core.batch_plan import QwenPlanner  # needs torch, which reading facts does not

    vision = model.config.vision_config
    return QwenPlanner(
        merge_size=vision.spatial_merge_size,
        patch_size=vision.patch_size,
        tokens_per_second=vision.tokens_per_second,
        window_size=vision.window_size,
    )


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
    packs_images=True,
    planner=_planner,
    fused={
        "Qwen2_5_VLForConditionalGeneration": "task_model",
        "Qwen2_5_VLModel": "media_model",
        "Qwen2_5_VLDecoderLayer": "decoder_layer",
        "Qwen2_5_VLAttention": "attention",
        "Qwen2MLP": "gated_mlp",
        "Qwen2_5_VLRMSNorm": "rms_norm",
        "Qwen2_5_VLVisionBlock": "vision_block",
        "Qwen2_5_VLVisionAttention": "vision_attention",
        "Qwen2_5_VLMLP": "gated_mlp",
        "Qwen2_5_VisionPatchEmbed": "patch_embed",
    },
    turns=CHATML_TURNS,
)
