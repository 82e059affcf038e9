"""What a run's folder tells: its record, config, history and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from fvlm_cli.checked import CONFIG, HISTORY, RECORD, check
from fvlm_cli.evaluation.rows import read_answers
from fvlm_cli.report.charts import Line, chart
from fvlm_cli.report.curve import smoothed
from fvlm_core.errors import DataError

# What is drawn: the label, and the keys of the history that may hold it.
_CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss (nats a token)", ("loss",)),
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("grad_norm",)),
    ("seconds a step", ("seconds_per_step",)),
    ("peak memory (GiB)", ("device_memory_gib", "host_memory_gib")),
    ("learned tokens said right", ("mean_token_accuracy",)),
)


@dataclass(frozen=True)
class Gathered:
    """A run.

    Attributes:
        folder: where it lies.
        record: `run.json`.
        config: `config.yaml`, as it stands there.
        history: `history.json`; empty where the run has not got so far.
        before, after: its answers, by place; empty where none were asked for.
    """

    folder: Path
    record: dict[str, Any]
    config: str
    history: list[dict[str, Any]]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """What the run is called: its folder."""
        return str(self.folder)

    def flat_config(self) -> dict[str, Any]:
        """Return the config by dotted keys."""
        sections: dict[str, dict[str, Any]] = yaml.safe_load(self.config)
        return {f"{name}.{key}": value for name, keys in sections.items() for key, value in (keys or {}).items()}

    def picture(self, name: str) -> Path:
        """Return the path of a picture that an answer names."""
        return self.folder / "eval" / name


def gather(folder: Path) -> Gathered:
    """Read a run's folder.

    Raises:
        DataError: there is no run there, or a file of it is damaged.
    """
    record = _json(folder / "run.json", RECORD)
    if record is None:
        raise DataError(f"{folder} holds no run.json, so it is no run of fvlm train; name the run's save.output_dir.")
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        check(folder / "config.yaml", yaml.safe_load(config), CONFIG)
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        raise DataError(f"{folder / 'config.yaml'} is missing or damaged; the run cannot be reported on.") from None
    answers = [_answers(folder / "eval" / f"{when}.jsonl") for when in ("before", "after")]
    return Gathered(folder, record, config, _json(folder / "history.json", HISTORY) or [], *answers)


def curves(runs: Sequence[Gathered]) -> list[tuple[str, str]]:
    """Return (label, SVG) of every chart that there is anything to draw in."""
    found = []
    for label, keys in _CURVES:
        lines = [
            line
            for number, (run, name) in enumerate(zip(runs, short_names(runs), strict=True))
            for line in _lines(run, number, keys, name if len(runs) > 1 else "")
        ]
        if lines:
            found.append((label, chart(lines, label)))
    return found


def short_names(runs: Sequence[Gathered]) -> list[str]:
    """Return what runs are called beside each other: the names of their folders, or the paths where these are equal."""
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [run.name for run in runs]


def _lines(run: Gathered, number: int, keys: tuple[str, ...], name: str) -> list[Line]:
    points = [(entry["step"], entry[key]) for entry in run.history for key in keys if key in entry]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    prefix = f"{name} " if name else ""
    if keys != ("loss",):
        return [Line(name or keys[0], steps, values, number)]
    lines = [
        Line(f"{prefix}each report", steps, values, number, faint=True),
        Line(f"{prefix}moving average", steps, smoothed(values), number),
    ]
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in run.history if "eval_loss" in entry]
    if evaluated:
        steps, values = zip(*evaluated, strict=True)
        lines.append(Line(f"{prefix}evaluation", steps, values, number, dots=True))
    return lines


def _answers(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    return {line["place"]: line for line in read_answers(path)}


def _json(path: Path, kind: TypeAdapter[Any]) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise DataError(f"{path} is damaged; the run cannot be reported on.") from None
    return check(path, content, kind)
