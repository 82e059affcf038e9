"""`key=value` and `--key value` on the command line, as OmegaConf's dot list."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fvlm_core.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")


def dot_list(words: Sequence[str]) -> list[str]:
    """Return the words that follow the config as `key=value` items.

    Taken are `key=value`, `--key=value`, `--key value`, and `--key` alone for true. Keys are dotted: `lora.r`.

    Raises:
        ConfigError: a word is none of these.
    """
    items = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--"):
            value = "true"
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
        elif not equals:
            raise ConfigError(f"{word!r} on the command line is no setting; write key=value or --key value.")
        if not _KEY.fullmatch(name):
            raise ConfigError(f"{word!r} on the command line names no key; write it like lora.r=32.")
        items.append(f"{name}={value}")
    return items
