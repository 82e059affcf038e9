"""Adapters whose config speaks of modules by names that transformers had before 4.52.

The tensors' own names are brought up to date one by one; a config says which modules they belong to in patterns, lists
of paths and ranks by pattern, which fit the older names only. What they ask for is worked out by the older names, and
written down by today's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key


def use_todays_names(config: Any, renamed: Mapping[str, str], modules: Iterable[str]) -> None:
    """Have a LoRA config name a model's modules as they are called today.

    Args:
        config: changed in place, if its patterns need it.
        renamed: older module name → today's, of the modules in the adapter's file.
        modules: today's names of all modules of the model.
    """
    older = _older_names(renamed, modules)
    if not any(name != old for name, old in older.items()):
        return
    asked = [name for name, old in older.items() if _asks_for(config, old)]
    if any(not _asks_for(config, name) for name in asked):
        config.target_modules = asked
    for patterns in (config.rank_pattern, config.alpha_pattern):
        found = {name: key for name in asked if (key := get_pattern_key(patterns.keys(), older[name])) in patterns}
        values = {f"^{re.escape(name)}": patterns[key] for name, key in found.items()}
        patterns.clear()
        patterns.update(values)


def _asks_for(config: Any, name: str) -> bool:
    if config.target_modules == "all-linear" or config.target_modules is None:
        return False
    return bool(check_target_module_exists(config, name))


def _older_names(renamed: Mapping[str, str], modules: Iterable[str]) -> dict[str, str]:
    """Return today's name → the older one, where a module lies in a part of the model that was renamed."""
    parts = {new: old for pair in renamed.items() for old, new in [_differing(*pair)]}
    longest_first = sorted(parts, key=len, reverse=True)
    found = {}
    for name in modules:
        part = next((new for new in longest_first if name == new or name.startswith(f"{new}.")), None)
        found[name] = name if part is None else parts[part] + name.removeprefix(part)
    return found


def _differing(old: str, new: str) -> tuple[str, str]:
    """Cut two names of one module down to where they differ and the component after that: it tells the part apart."""
    a, b = old.split("."), new.split(".")
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    cut = max(0, same - 1)
    return ".".join(a[: len(a) - cut]), ".".join(b[: len(b) - cut])
