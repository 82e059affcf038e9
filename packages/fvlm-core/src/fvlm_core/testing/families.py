"""Which families have a tiny checkpoint, and the module that builds each: an explicit lookup, one line a family."""

from __future__ import annotations

from importlib.util import find_spec

BUILDERS: dict[str, str] = {
    "qwen2_vl": "fvlm_core.testing.qwen",
    "qwen2_5_vl": "fvlm_core.testing.qwen",
    "qwen3_vl": "fvlm_core.testing.qwen",
    "mllama": "fvlm_core.testing.mllama",
    "pixtral": "fvlm_core.testing.mistral",
    "mistral3": "fvlm_core.testing.mistral",
    "gemma3": "fvlm_core.testing.siglip",
    "paligemma": "fvlm_core.testing.siglip",
    "llava_onevision": "fvlm_core.testing.siglip",
    "idefics3": "fvlm_core.testing.idefics",
    "smolvlm": "fvlm_core.testing.idefics",
    "internvl": "fvlm_core.testing.internvl",
}
"""Family → the module whose function of the same name returns its blueprint."""

NEEDS: dict[str, str] = {"smolvlm": "num2words"}
"""Family → a package, outside fvlm-core's dependencies, without which its processor class cannot be made."""

FAMILIES: tuple[str, ...] = tuple(name for name in BUILDERS if name not in NEEDS or find_spec(NEEDS[name]))
"""The families that `tiny_checkpoint` can build here."""
