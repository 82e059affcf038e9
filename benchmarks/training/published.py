"""Widths and depths of the published configurations, a model a family, for checkpoints of real size.

Each entry lays its values over a family's tiny checkpoint (`fvlm_core.testing`), which brings the tokenizer, the chat
template and the real classes. Keys: ``family``, and the values of ``text_config`` (``text``), ``vision_config``
(``vision``) and the config itself (``config``), of the image processor (``image``) and of the processor's constructor
(``processor``); ``tied``: whether head and embedding are one; ``tokens``: special tokens that the tiny tokenizer lacks.
A model that is cut in depth says so in its name.
"""

from __future__ import annotations

from typing import Any

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def _text(
    width: int, mlp: int, layers: int, heads: tuple[int, int], vocab: int, rope: dict[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """Return a text config; ``heads``: of queries, of keys and values."""
    positions = {} if rope is None else {"rope_parameters": rope}
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        **positions,
        **more,
    }


def _siglip(image_size: int, layers: int = 27) -> dict[str, Any]:
    """Return SigLIP So400m for patches of 14 × 14 pixels."""
    return {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": image_size,
        "patch_size": 14,
    }


def _pixtral(image_size: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": image_size,
        "patch_size": patch,
    }


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _pixels(patch: int) -> dict[str, int]:
    """Return how few and how many pixels an image of the Qwen families may have: at most 1280 tokens."""
    return {"shortest_edge": 16 * patch**2, "longest_edge": 4 * patch**2 * 1280}


def _cells(side: int) -> list[str]:
    """Return the tokens that Idefics and its kin write before the crops of an image."""
    return [f"<row_{row}_col_{column}>" for row in range(1, side + 1) for column in range(1, side + 1)]


_QWEN2_VISION = {"depth": 32, "num_heads": 16}
_QWEN_ROPE = _rope(1e6, mrope_section=[16, 24, 24])
_GRID = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_vl-2b": {
        "family": "qwen2_vl",
        "text": _text(1536, 8960, 28, (12, 2), 151936, _QWEN_ROPE),
        "vision": {**_QWEN2_VISION, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4},
        "tied": True,
        "image": {"size": _pixels(14)},
    },
    "qwen2_5_vl-7b": {
        "family": "qwen2_5_vl",
        "text": _text(3584, 18944, 28, (28, 4), 152064, _QWEN_ROPE),
        "vision": {
            **_QWEN2_VISION,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tied": False,
        "image": {"size": _pixels(14)},
    },
    "qwen3_vl-4b": {
        "family": "qwen3_vl",
        "text": _text(2560, 9728, 36, (32, 8), 151936, _rope(5e6, mrope_section=[24, 20, 20]), head_dim=128),
        "vision": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tied": True,
        "image": {"size": _pixels(16)},
    },
    "mllama-11b": {
        "family": "mllama",
        "text": _text(4096, 14336, 40, (32, 8), 128256, _LLAMA3, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38]),
        "vision": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_global_layers": 8,
            "attention_heads": 16,
            "image_size": 560,
            "patch_size": 14,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "vision_output_dim": 7680,
        },
        "tied": False,
        "image": {"size": _square(560), "max_image_tiles": 4},
    },
    "pixtral-12b": {
        "family": "pixtral",
        "text": _text(5120, 14336, 40, (32, 8), 131072, _rope(1e9), head_dim=128),
        "vision": _pixtral(1024, 16),
        "tied": False,
        "image": {"size": {"longest_edge": 1024}},
        "processor": {"patch_size": 16, "spatial_merge_size": 1},
    },
    "mistral3-24b-20of40layers": {
        "family": "mistral3",
        "text": _text(5120, 32768, 20, (32, 8), 131072, _rope(1e9), head_dim=128),
        "vision": _pixtral(1540, 14),
        "tied": False,
        "image": {"size": {"longest_edge": 1540}},
        "processor": {"patch_size": 14, "spatial_merge_size": 2},
    },
    "gemma3-4b": {
        "family": "gemma3",
        "text": _text(
            2560, 10240, 34, (8, 4), 262208, None, head_dim=256, sliding_window=1024, query_pre_attn_scalar=256
        ),
        "vision": _siglip(896),
        "config": {"mm_tokens_per_image": 256},
        "tied": True,
        "image": {"size": _square(896)},
        "processor": {"image_seq_length": 256},
    },
    "smolvlm2-2b": {
        "family": "smolvlm",
        "text": _text(2048, 8192, 24, (32, 32), 49280, _rope(130_000.0)),
        "vision": _siglip(384),
        "config": {"scale_factor": 3},
        "tied": False,
        "image": {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
        "processor": {"image_seq_len": 81},
        "tokens": _cells(6),
    },
    "idefics3-8b": {
        "family": "idefics3",
        "text": _text(4096, 14336, 32, (32, 8), 128259, _LLAMA3),
        "vision": _siglip(364),
        "config": {"scale_factor": 2},
        "tied": False,
        "image": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
        "processor": {"image_seq_len": 169},
        "tokens": _cells(6),
    },
    "internvl3-2b": {
        "family": "internvl",
        "text": _text(1536, 8960, 28, (12, 2), 151674, _rope(1e6)),
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        "config": {"image_seq_length": 256},
        "tied": False,
        "image": {"size": _square(448), "crop_to_patches": True, "max_patches": 12},
        "processor": {"image_seq_length": 256},
    },
    "llava_onevision-7b": {
        "family": "llava_onevision",
        "text": _text(3584, 18944, 28, (28, 4), 152128, _rope(1e6)),
        "vision": _siglip(384, layers=26),
        "config": {"image_grid_pinpoints": _GRID},
        "tied": False,
        "image": {"size": _square(384), "image_grid_pinpoints": _GRID},
        "processor": {"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
    },
    "paligemma-3b": {
        "family": "paligemma",
        "text": _text(2048, 16384, 18, (8, 1), 257216, _rope(10_000.0), head_dim=256),
        "vision": _siglip(224),
        "config": {"hidden_size": 2048, "projection_dim": 2048, "vocab_size": 257216},
        "tied": True,
        "image": {"size": _square(224), "image_seq_length": 256},
    },
}
