"""What pydantic found wrong in a config, in one sentence for its author."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from fvlm_cli.config.nearest import hint
from fvlm_cli.config.schema import SourceSection, TrainConfig

_COMMAND_LINE = "the command line"


def explain(error: ValidationError, path: str, overridden: set[str], written: Any) -> str:
    """Return the first problem in one sentence: the place, the key, what was written, and what it should be.

    Args:
        error: what validating a `TrainConfig` raised.
        path: the config file.
        overridden: the keys that were given on the command line instead.
        written: the config as it was written, interpolations unresolved.
    """
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelling explains the rest
    location = _keys(first["loc"])
    key = ".".join(location)
    where = _COMMAND_LINE if any(item == key or item.startswith(f"{key}.") for item in overridden) else path
    section = _section(location[:-1])
    if (sentence := _of_source(problems, key, where, written)) is not None:
        return sentence
    if first["type"] == "extra_forbidden" and section is not None:
        prefix = "".join(f"{name}." for name in location[:-1])
        return f"{where}: {key} is not a key of the config; {hint(location[-1], section.model_fields, prefix)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing; {_meaning(location)}"
    return f"{where}: {key} is {_value(written, location)}: {_wish(problems, location)}; {_meaning(location)}"


def _of_source(problems: Sequence[Any], key: str, where: str, written: Any) -> str | None:
    """Return what is wrong with a dataset that was written with keys of its own, or None where that is not it."""
    inside = [problem for problem in problems if SourceSection.__name__ in problem["loc"][:-1]]
    for problem in sorted(inside, key=lambda problem: problem["type"] != "extra_forbidden"):
        *before, name = problem["loc"]
        number = next((item for item in before if isinstance(item, int)), None)
        if not isinstance(_at(written, key, number), Mapping):
            continue
        holder = key if number is None else f"{key}[{number}]"
        if problem["type"] == "extra_forbidden":
            return f"{where}: {holder}.{name} is not a key of a dataset; {hint(str(name), SourceSection.model_fields)}"
        if name in SourceSection.model_fields:
            missing = problem["type"] == "missing"
            wrong = "is missing" if missing else f"should {_words(problem['msg'])}"
            return f"{where}: {holder}.{name} {wrong}; it means: {SourceSection.model_fields[name].description}"
    return None


def _at(written: Any, key: str, number: int | None) -> Any:
    for name in key.split("."):
        written = written.get(name) if isinstance(written, Mapping) else None
    if number is None:
        return written
    return written[number] if isinstance(written, list) and number < len(written) else None


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the part of pydantic's location that is keys of the config, without the branches of unions."""
    keys: list[str] = []
    model: type[BaseModel] | None = TrainConfig
    for item in location:
        if model is None:
            break
        keys.append(str(item))
        model = _section(keys)
    return keys


def _section(keys: Sequence[str]) -> type[BaseModel] | None:
    model: type[BaseModel] = TrainConfig
    for key in keys:
        field = model.model_fields.get(key)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


def _meaning(keys: Sequence[str]) -> str:
    section = _section(keys[:-1])
    field = section.model_fields.get(keys[-1]) if section is not None else None
    if field is None:
        return "see fvlm train --schema."
    inner = _section(keys)
    if inner is not None:
        return f"its keys are {', '.join(inner.model_fields)}."
    return f"{'.'.join(keys)} means: {field.description}"


def _wish(problems: Sequence[Any], keys: Sequence[str]) -> str:
    """Return what a key's value should be, in pydantic's words; each branch of a union has its own."""
    if _section(keys) is not None:
        return "it should be a section"
    messages = [_words(problem["msg"]) for problem in problems if _keys(problem["loc"]) == list(keys)]
    return "it should " + " or ".join(dict.fromkeys(messages))


def _words(message: str) -> str:
    """Return what pydantic says after "should", in words of the config."""
    words = message.partition(" should ")[2] or message
    return words.replace("valid dictionary or instance of SourceSection", "section with a path")


def _value(written: Any, keys: Sequence[str]) -> str:
    if list(keys) == ["model", "token"]:
        return "not shown"
    for key in keys:
        if not isinstance(written, Mapping):
            break
        written = written.get(key)
    text = repr(written)
    return text if len(text) <= 80 else text[:77] + "…"
