"""Why a call of ``generate`` is left to transformers: what the model is, and what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fvlm_core.fused.cache import NAMES
from fvlm_core.fused.kinds import kind_of

MOST_ROWS = 8
_SELF = ("decoder_layer", "sandwich_layer")
_ATTENTION = ("attention", "config_window_attention")
_CROSSING = "cross_layer"
_ROPES_OF_LENGTH = ("dynamic", "longrope")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "use_cache": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
    "token_healing": (False,),
    "is_assistant": (False,),
    **dict.fromkeys(
        ("cache_implementation", "prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers", "constraints"), ()
    ),
    **dict.fromkeys(("force_words_ids", "prefill_chunk_size", "low_memory"), (False,)),
}
"""Settings of generation → the values, beside None, that the plain loop is for."""
_ARGUMENTS = (
    *("assistant_model", *NAMES, "custom_generate", "inputs_embeds", "negative_prompt_ids"),
    *("prefix_allowed_tokens_fn", "synced_gpus", "adapter_names", "encoder_outputs", "position_ids"),
)
"""Arguments of ``generate`` that are not for it."""


def crossing_layers(layers: Any) -> list[bool]:
    """For each layer of a language model, whether it attends to images instead of the text."""
    return [kind_of(layer) == _CROSSING for layer in layers]


def model_unfit(language: Any) -> str | None:
    """Say why the decoding of a language model is never recorded, or None."""
    for layer in language.layers:
        kind = kind_of(layer)
        if kind in _SELF and kind_of(layer.self_attn) not in _ATTENTION:
            return "its attention layers are not fused"
        if kind not in (*_SELF, _CROSSING):
            return "its layers are not fused"
    parameters = language.config.rope_parameters or {}
    types = {parameters.get("rope_type"), *(p.get("rope_type") for p in parameters.values() if isinstance(p, Mapping))}
    if types & set(_ROPES_OF_LENGTH):
        return "its rotary embedding depends on the length"
    return None


def call_unfit(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Say why a call of ``generate`` is not for the plain loop, or None.

    Args:
        model: the task model.
        arguments: of the call, by name.
    """
    asked = next((name for name in _ARGUMENTS if arguments.get(name) not in (None, False)), None)
    if asked is not None:
        return f"{asked} was given"
    configs = [c for c in (arguments.get("generation_config"), model.generation_config) if c is not None]
    for name, plain in _PLAIN.items():
        value = arguments.get(name)
        for config in configs:
            value = vars(config).get(name) if value is None else value
        if value is not None and value not in plain:
            return f"{name}={value!r} was asked for"
    if arguments.get("stop_strings") is None and any(vars(c).get("stop_strings") for c in configs):
        return "stop_strings come with the generation config"
    return None
