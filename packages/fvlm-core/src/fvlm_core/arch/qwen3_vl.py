"""Qwen3-VL: some vision blocks feed the first text layers (deepstack), each through a merger of its own.

In 16 bit stay all mergers and the head, for the reasons given in qwen2_vl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvlm_core.arch.facts import CHATML_TURNS, ArchFacts, MediaTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fvlm_core.batch_plan import QwenPlanner


def _planner(model: PreTrainedModel) -> QwenPlanner:
    from fvlm_core.batch_plan import QwenPlanner  # needs torch, which reading facts does not

    vision = model.config.vision_config
    tower: Any = model.get_submodule("model.visual")
    return QwenPlanner(
        merge_size=vision.spatial_merge_size,
        patch_size=vision.patch_size,
        frames_apart=True,
        grid_per_side=tower.num_grid_per_side,
        interpolation=(tower.interpolation_mode, tower.interpolation_align_corners),
    )


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
    packs_images=True,
    planner=_planner,
    fused={
        "Qwen3VLForConditionalGeneration": "task_model",
        "Qwen3VLModel": "deep_media_model",
        "Qwen3VLTextModel": "text_model",
        "Qwen3VLTextDecoderLayer": "decoder_layer",
        "Qwen3VLTextAttention": "attention",
        "Qwen3VLTextMLP": "gated_mlp",
        "Qwen3VLTextRMSNorm": "rms_norm",
        "Qwen3VLVisionBlock": "vision_block",
        "Qwen3VLVisionAttention": "vision_attention",
        "Qwen3VLVisionMLP": "plain_mlp",
        "Qwen3VLVisionPatchEmbed": "patch_embed",
    },
    turns=CHATML_TURNS,
)
