"""A command line that cannot be read: what is wrong with it and what to write instead, in one sentence.

Typer finds these errors before a verb begins, and words them anew with each version; the values, the ranges and the
choices named here come from the command line and from the verb's own signature.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from fvlm_cli.config.nearest import hint
from fvlm_core.errors import ConfigError

# What Typer raises for a wrong command line. It exports this class under no name of its own, only its subclass.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def explain_usage(error: Exception, words: Sequence[str], verbs: Mapping[str, Any]) -> str:
    """Return the place, the value and the remedy in one sentence.

    Args:
        error: a `UsageError`.
        words: the command line after `fvlm`.
        verbs: typer's command of each verb.
    """
    about = vars(error)
    context = about.get("ctx")
    # What a word's option lacks or should not have is raised without a context.
    command = verbs.get(next(iter(words), "")) if context is None else context.command
    if command is None:
        return f"{_plain(error)}; see fvlm --help."
    place = f"{command.name}: " if command.name in verbs else ""
    option, parameter = about.get("option_name"), about.get("param")
    if option is not None:
        return place + _of_option(option, command, error, within=bool(place))
    if parameter is None:
        return f"{place}{_plain(error)}; see fvlm {command.name} --help."
    name = _name(parameter)
    if not about["message"]:
        return f"{place}{name} is missing; it means: {_help(parameter)}"
    return place + _of_value(name, parameter, command, error, words)


def unknown_verb(word: str, verbs: Sequence[str]) -> str:
    """Return the sentence for a first word that is no verb."""
    return f"{word!r} is no verb of fvlm; {hint(word, verbs)}"


def asks_for(option: str, words: Sequence[str]) -> bool:
    """Return whether an option such as `--json` stands on a command line that could not be read."""
    before = words[: words.index("--")] if "--" in words else words
    return option in before


def check_settings(settings: Sequence[str], options: Sequence[str]) -> None:
    """Refuse a misspelt option among the words that replace keys of a config, where any option is taken for a key.

    Raises:
        ConfigError: a word such as `--nprocs` is neither an option nor in a section of the config.
    """
    from fvlm_cli.config.schema import TrainConfig

    for word in settings:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name and name[2:] not in TrainConfig.model_fields:
            raise ConfigError(f"{name} is no option, nor a key with its section like --lora.r; {hint(name, options)}")


def _of_option(option: str, command: Any, error: Exception, *, within: bool) -> str:
    known = {name: item for item in command.params for name in (*item.opts, *item.secondary_opts)}
    if option in known:
        if "not take" in _plain(error):
            return f"{option} takes no value; write {option} alone."
        return f"{option} lacks its value; it means: {_help(known[option])}"
    if not within:
        return f"{option} stands before the verb; write fvlm VERB {option}, or see fvlm --help."
    return f"{option} is no option; {hint(option, [name for name in known if name.startswith('--')])}"


def _of_value(name: str, parameter: Any, command: Any, error: Exception, words: Sequence[str]) -> str:
    annotation = _annotation(parameter.name, command)
    written = _written(parameter.opts, words)
    choices = _choices(annotation)
    if choices and written:
        wrong = next((item for item in written if item not in choices), written[-1])
        return f"{name} is {wrong!r}; {hint(wrong, choices)}"
    wish = _number(annotation)
    if wish is None or not written:
        return f"{name}: {_plain(error)}; it means: {_help(parameter)}"
    return f"{name} is {written[-1]!r}; give {wish}."


def _annotation(name: str, command: Any) -> Any:
    parameters = inspect.signature(command.callback).parameters
    return parameters[name].annotation if name in parameters else None


def _written(names: Sequence[str], words: Sequence[str]) -> list[str]:
    """Return what was written for an option, `--name value` or `--name=value`, each time."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            found.append(value if equals else following)
    return found


def _bare(annotation: Any) -> tuple[Any, Any]:
    """Return an annotation without `Annotated`, `None` and `list`, and the option's own description."""
    info = None
    while True:
        origin, inner = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            annotation, info = inner[0], inner[1]
        elif origin in (Union, types.UnionType):
            annotation = next(item for item in inner if item is not type(None))
        elif origin is list:
            annotation = inner[0]
        else:
            return annotation, info


def _choices(annotation: Any) -> tuple[str, ...]:
    bare, _ = _bare(annotation)
    return get_args(bare) if get_origin(bare) is Literal else ()


def _number(annotation: Any) -> str | None:
    bare, info = _bare(annotation)
    if bare not in (int, float) or info is None:
        return None
    kind = "a whole number" if bare is int else "a number"
    if info.min is not None and info.max is not None:
        return f"{kind} from {info.min} to {info.max}"
    if info.min is not None:
        return f"{kind}, {info.min} or more"
    return kind


def _name(parameter: Any) -> str:
    options = [name for name in parameter.opts if name.startswith("--")]
    if options:
        return str(options[0])
    return str(parameter.metavar or parameter.name.upper())


def _help(parameter: Any) -> str:
    return " ".join((parameter.help or "see --help.").split())


def _plain(error: Exception) -> str:
    """Return Typer's own words as part of a sentence."""
    message = " ".join(str(vars(error)["message"]).split()).rstrip(".")
    return message[:1].lower() + message[1:]
