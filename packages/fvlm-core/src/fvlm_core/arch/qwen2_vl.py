"""Qwen2-VL: a vision transformer with full attention, a merger of 2 × 2 patches at its end, a Qwen2 text model.

In 16 bit stay the merger, which every image passes through and which is small, and the head, whose rounding goes
straight into the loss (it is often tied to the embedding, which is not quantized either).
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
    return QwenPlanner(merge_size=vision.spatial_merge_size, patch_size=vision.patch_size)


FACTS = ArchFacts(
    model_type="qwen2_vl",
    vision=("model.visual",),
    projector=("model.visual.merger",),
    language=("model.language_model",),
    attention=("attn.qkv", "attn.proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
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
        "Qwen2VLForConditionalGeneration": "task_model",
        "Qwen2VLModel": "media_model",
        "Qwen2VLDecoderLayer": "decoder_layer",
        "Qwen2VLAttention": "attention",
        "Qwen2MLP": "gated_mlp",
        "Qwen2VLRMSNorm": "rms_norm",
        "Qwen2VLVisionBlock": "vision_block",
        "VisionAttention": "vision_attention",
        "VisionMlp": "plain_mlp",
        "PatchEmbed": "patch_embed",
    },
    turns=CHATML_TURNS,
)
