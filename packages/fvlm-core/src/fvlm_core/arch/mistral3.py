"""Mistral Small 3.1 and later: a Pixtral tower, a projector that merges 2 × 2 patches, a Mistral text model.

In 16 bit stay the projector with its patch merger and the head, for the reasons given in llava.
"""

from __future__ import annotations

from fvlm_core.arch.facts import INST_TURNS, ArchFacts, MediaTokens
from fvlm_core.arch.pixtral import MISTRAL, PIXTRAL

FACTS = ArchFacts(
    model_type="mistral3",
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
    least_image_tokens=2,  # its class takes the dimension of one token's features for one that is too many
    fused={
        "Mistral3ForConditionalGeneration": "task_model",
        "Mistral3Model": "sized_media_model",
        "Mistral3MultiModalProjector": "merging_projector",
        "Mistral3RMSNorm": "rms_norm",
        **PIXTRAL,
    },
    fused_text={"mistral": MISTRAL},
    turns=INST_TURNS,
)
