"""Tiny random checkpoints of every model family, built offline in about a second, with the real processor classes.

For the tests of every package and for contributors who add a family (docs/add-a-model.md)::

    from fvlm_core.testing import tiny_checkpoint

    folder = tiny_checkpoint("qwen2_vl", tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvlm_core.testing.families import FAMILIES

if TYPE_CHECKING:
    from fvlm_core.testing.checkpoint import tiny_checkpoint

__all__ = ["FAMILIES", "tiny_checkpoint"]


def __getattr__(name: str) -> Any:
    if name == "tiny_checkpoint":  # torch and transformers come with it, so only when it is asked for
        from fvlm_core.testing.checkpoint import tiny_checkpoint

        return tiny_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
