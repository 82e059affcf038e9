"""Pixtral 12B: LLaVA's frame around a Pixtral tower and a Mistral text model. Other LLaVAs take the generic path.

In 16 bit stay the projector, which every image passes through and which is small, and the head, whose rounding goes
straight into the loss.
"""

from __future__ import annotations

from fvlm_core.arch.facts import INST_TURNS, ArchFacts, MediaTokens
from fvlm_core.arch.pixtral import MISTRAL, PIXTRAL

FACTS = ArchFacts(
    model_type="llava",
    vision_type="pixtral",
    vision=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    language=("model.language_model",),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    layers={
        "vision": ("model.vision_tower.transformer.layers",),
        "language": ("model.language_model.layers",),
    },
    unquantized=("model.multi_modal_projector", "lm_head"),
    media=MediaTokens(
        image=("image_token_index",),
        processor=("image_break_token_id", "image_end_token_id"),
    ),
    fused={
        "LlavaForConditionalGeneration": "task_model",
        "LlavaModel": "sized_media_model",
        "LlavaMultiModalProjector": "plain_mlp",
        **PIXTRAL,
    },
    fused_text={"mistral": MISTRAL},
    turns=INST_TURNS,
)
