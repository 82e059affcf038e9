"""Options of loading a model: which there are, and values that would be taken for what they are not."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from fvlm_core.errors import ConfigError

# Where files come from: given to every transformers function that reads some.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "subfolder")
# How the model is built and placed: given to the model's from_pretrained.
MODEL_OPTIONS = (
    "attn_implementation",
    "code_revision",
    "disable_mmap",
    "experts_implementation",
    "key_mapping",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "variant",
)
_OWN = ("fused_layers", "memory_budget")


def check_options(kwargs: dict[str, Any]) -> None:
    """Refuse options that `fvlm_core.load.load_model` does not know.

    Raises:
        ConfigError: one is unknown; the message names the nearest known one.
    """
    known = (*HUB_OPTIONS, *MODEL_OPTIONS, *_OWN)
    for name in kwargs:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"the nearest one is {near[0]!r}." if near else f"known options are {', '.join(sorted(known))}."
            raise ConfigError(f"{name!r} is not an option of loading a model: {hint}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: ``"no"`` would be taken for True.

    Raises:
        ConfigError: it is no boolean.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not a boolean: pass True or False.")
