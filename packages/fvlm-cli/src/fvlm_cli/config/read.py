"""A YAML file and the words after it → a checked `TrainConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from fvlm_cli.config.contradictions import contradictions
from fvlm_cli.config.explain import explain
from fvlm_cli.config.overrides import dot_list
from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.config.secrets import exposed_secret, secrets_of
from fvlm_core.errors import ConfigError


def read_config(path: str | Path, words: Sequence[str] = ()) -> TrainConfig:
    """Read a training config.

    Args:
        path: a YAML file. `${oc.env:NAME}` in it stands for an environment variable, `${lora.r}` for another key.
        words: what followed it on the command line: `key=value`, `--key value`.

    Raises:
        ConfigError: the file cannot be read, or a key or value in it or on the command line cannot be used; the message
            says which and where it was.
    """
    file = _load(Path(path))
    items = dot_list(words)
    given = _parse(items)
    _make_way(file, given, {item.partition("=")[0] for item in items})
    try:
        merged = OmegaConf.merge(file, given)
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "a value"
        raise ConfigError(f"{path}: {key} cannot be resolved: {_first_line(error.msg or error)}.") from None
    written = OmegaConf.to_container(merged, resolve=False)  # errors show what was written, not a secret it stands for
    try:
        config = TrainConfig.model_validate(plain)
    except ValidationError as error:
        overridden = {item.partition("=")[0] for item in items}
        raise ConfigError(explain(error, str(path), overridden, written)) from None
    config.remember(secrets_of(written))
    if (wrong := exposed_secret(written) or contradictions(config)) is not None:
        raise ConfigError(f"{path}: {wrong}")
    return config


def _load(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read ({reason}); give a YAML file of keys and values.") from None
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}," if error.problem_mark is not None else ""
        raise ConfigError(f"{path}{place} is not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not valid YAML: {_first_line(error)}.") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a list, not a config; its keys are {', '.join(TrainConfig.model_fields)}.")
    return loaded


def _make_way(file: DictConfig, given: DictConfig, keys: set[str]) -> None:
    """Take out of the file what the command line replaces by another kind of value, which OmegaConf cannot merge."""
    plain = [
        OmegaConf.to_container(config, resolve=False) for config in (file, given)
    ]  # what they refer to may be elsewhere
    for key in keys:
        old, new = (_at(config, key) for config in plain)
        if isinstance(old, dict | list) and isinstance(new, dict | list) and type(old) is not type(new):
            OmegaConf.update(file, key, None, merge=False)


def _at(node: object, key: str) -> object:
    for step in key.split("."):
        node = node.get(step) if isinstance(node, dict) else None
    return node


def _parse(items: list[str]) -> DictConfig:
    try:
        return OmegaConf.from_dotlist(items)
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        shown = ", ".join(item.partition("=")[0] for item in items)
        raise ConfigError(f"the settings on the command line ({shown}) cannot be read: {_first_line(error)}.") from None


def _first_line(error: object) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
