"""Values of a config that stand for others, `${oc.env:NAME}` or `${model.token}`: saved as they were written.

Any of them may hold a secret, whatever its variable or key is called. What a checkpoint depends on is the exception: it
is saved as what it stands for, so that a resumed run can be compared with it, and PEFT writes it into the adapter's own
config. So it may not stand for what its variable's name calls a secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_SECRET = re.compile(r"\$\{oc\.env:[^}]*?(TOKEN|KEY|SECRET|PASSW)", re.IGNORECASE)

_KEY = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")

Place = tuple[str | int, ...]
TOKEN: Place = ("model", "token")

# What must stay the same for a checkpoint to fit: these keys are compared when a run is resumed.
FIXED = (("model", "name"), ("model", "revision"), ("model", "precision"), ("lora",))


def secrets_of(written: Any) -> dict[Place, str]:
    """Return where a config refers to variables or other keys, with what it says there: `${oc.env:WANDB_API_KEY}`.

    Args:
        written: the config, interpolations unresolved.
    """
    texts = dict(_texts(written, ()))
    return {place: text for place, text in texts.items() if "${" in text and not _is_fixed(place)}


def exposed_secret(written: Any) -> str | None:
    """Return what is wrong in one sentence where something that a checkpoint depends on stands for a secret."""
    texts = dict(_texts(written, ()))
    for place, text in texts.items():
        if _is_fixed(place) and _leads_to_secret(text, texts, frozenset()):
            key = ".".join(map(str, place))
            return (
                f"{key} refers to a secret ({text}), and is written into the run's config and the adapter's; write it "
                "out, or name its variable otherwise if it is none. A token belongs in model.token."
            )
    return None


def token_reference(secrets: dict[Place, str]) -> str | None:
    """Return what a saved config says in the place of `model.token`: nothing, unless another key refers to it.

    The variable may be missing where the config is read again.
    """
    if not any(place != TOKEN and "${model.token}" in text for place, text in secrets.items()):
        return None
    variable = re.match(r"\$\{oc\.env:(\w+)", secrets.get(TOKEN, ""))
    return f"${{oc.env:{variable[1] if variable else 'HF_TOKEN'},null}}"


def _is_fixed(place: Place) -> bool:
    return any(place[: len(key)] == key for key in FIXED)


def _leads_to_secret(text: str, texts: Mapping[Place, str], passed: frozenset[Place]) -> bool:
    if _SECRET.search(text):
        return True
    for name in _KEY.findall(text):
        place: Place = tuple(name.split("."))
        if place == TOKEN:
            return True
        if place in texts and place not in passed and _leads_to_secret(texts[place], texts, passed | {place}):
            return True
    return False


def hide(plain: Any, secrets: dict[Place, str]) -> None:
    """Put what was written in the place of what it stands for, where that is still there."""
    for (*before, last), text in secrets.items():
        holder = plain
        for step in before:
            holder = holder[step] if _has(holder, step) else None
        if _has(holder, last):
            holder[last] = text


def _has(holder: Any, step: str | int) -> bool:
    if isinstance(holder, dict):
        return step in holder
    return isinstance(holder, list) and isinstance(step, int) and step < len(holder)


def _texts(node: Any, at: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(node, str):
        yield at, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, (*at, key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, (*at, number))
