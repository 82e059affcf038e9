"""Merge, verify, save and push fine-tuned vision-language models.

Importing this package changes nothing and loads neither torch nor transformers: names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvlm_export.adapter_note import AdapterNote, note_of, note_training, read_note
    from fvlm_export.push import push_to_hub_merged
    from fvlm_export.record import MergeReport, check_files, read_report
    from fvlm_export.save import save_pretrained_merged

__version__ = "0.1.0"

__all__ = [
    "AdapterNote",
    "MergeReport",
    "check_files",
    "note_of",
    "note_training",
    "push_to_hub_merged",
    "read_note",
    "read_report",
    "save_pretrained_merged",
]

_HOME = {
    "AdapterNote": "adapter_note",
    "note_of": "adapter_note",
    "note_training": "adapter_note",
    "read_note": "adapter_note",
    "MergeReport": "record",
    "check_files": "record",
    "push_to_hub_merged": "push",
    "read_report": "record",
    "save_pretrained_merged": "save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
