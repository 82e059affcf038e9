"""A run's folder: what is in it, who may write into it, and how a part of it appears only when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.config.secrets import FIXED
from fvlm_core.errors import ConfigError


class RunFolder:
    """The folder that a run leaves.

    `adapter` (or `model`, after full finetuning) and `merged` are what was asked for; `checkpoints` is what a resumed
    run goes on from; `eval` holds the answers before and after training, where they were asked for; `config.yaml` is
    the config with every default, `run.json` the versions and the outcome, and `history.json` what was logged.

    Args:
        root: the folder.
        writes: whether this process is the one that writes into it; of several, one does.
    """

    def __init__(self, root: Path, *, writes: bool = True) -> None:
        self.root = root
        self.writes = writes
        self.adapter = root / "adapter"
        self.model = root / "model"
        self.merged = root / "merged"
        self.checkpoints = root / "checkpoints"
        self.evaluation = root / "eval"
        self.config = root / "config.yaml"
        self.record = root / "run.json"
        self.history = root / "history.json"
        self._earlier = root / ".earlier"

    def check(self, config: TrainConfig, resume: bool) -> None:
        """Look at the folder before anything takes time; nothing is changed.

        Raises:
            ConfigError: it holds something and neither `save.overwrite` nor `resume` says what to do with it; or a run
                is resumed with another model or other adapters.
            PermissionError: it cannot be written.
        """
        if not self.writes:
            return
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"save.output_dir={str(self.root)!r} is a file; name a folder.")
        used = self.root.is_dir() and any(self.root.iterdir())
        if resume:
            self._check_same(config)
        elif used and not config.save.overwrite:
            raise ConfigError(
                f"save.output_dir={str(self.root)!r} is not empty; name another folder, go on with --resume, or "
                "replace the earlier run with save.overwrite=true."
            )
        place = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    def prepare(self, config: TrainConfig, resume: bool) -> None:
        """Make the folder ready for a run that was checked, and write its config.

        An earlier run that is not gone on from is set aside, until this one has results.
        """
        if not self.writes:
            return
        if not resume:
            self._set_aside()
        self.root.mkdir(parents=True, exist_ok=True)
        plain = config.to_save()
        self.config.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def leave_empty(self) -> None:
        """Remove the folders that were made for a run which was refused."""
        for path in (self.checkpoints, self.root):
            with suppress(OSError):  # it holds something, or was never made
                path.rmdir()

    def break_off(self, record: Mapping[str, Any]) -> None:
        """End a run that something stopped: say so in its record, or where it has no results yet, undo `prepare`."""
        if not self.writes:
            return
        with suppress(OSError):  # what stopped the run may be a full disk, and is what the user is to be told
            if self._has_results():
                self.write_record({**record, "status": "failed"})
                self.forget_earlier()
                return
            for part in self._parts():
                _remove(part)
            self._put_back()
        self.leave_empty()

    def forget_earlier(self) -> None:
        """Remove the run that was set aside: this one has results."""
        if self.writes:
            _remove(self._earlier)

    def _set_aside(self) -> None:
        killed = self._earlier.is_dir() and not self._has_results()  # a run that set another aside and came no further
        if not killed:
            _remove(self._earlier)
        for part in self._parts():
            if killed:
                _remove(part)
            else:
                self._earlier.mkdir(exist_ok=True)
                part.rename(self._earlier / part.name)

    def _put_back(self) -> None:
        if self._earlier.is_dir():
            for part in self._earlier.iterdir():
                part.rename(self.root / part.name)
            self._earlier.rmdir()

    def _has_results(self) -> bool:
        results = (self.adapter, self.model, self.merged, *self.checkpoints.glob("checkpoint-*"))
        return any(path.exists() for path in results)

    def _parts(self) -> list[Path]:
        """Return what there is of what a run leaves; whatever else lies in the folder is not its business."""
        folders = (self.adapter, self.model, self.merged, self.checkpoints, self.evaluation)
        files = (self.config, self.record, self.history, self.root / "report.html")
        return [part for part in (*folders, *files) if part.exists()]

    def _check_same(self, config: TrainConfig) -> None:
        if not self.config.is_file():
            raise ConfigError(f"{self.root} holds no run to resume; leave --resume out to start one.")
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError):
            raise ConfigError(f"{self.config} is damaged; start anew with save.overwrite=true.") from None
        now = config.to_save()
        for path in FIXED:
            key = ".".join(path)
            old, new = _at(before, path), _at(now, path)
            if isinstance(old, dict) and isinstance(new, dict):
                differing = [name for name in new if old.get(name) != new[name]]
                if not differing:
                    continue
                key, old, new = f"{key}.{differing[0]}", old.get(differing[0]), new[differing[0]]
            if old != new:
                raise ConfigError(
                    f"the run in {self.root} has {key}={old!r} and the config says {new!r}; put it back, or start anew."
                )

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        if self.writes:
            _write_json(self.record, record)

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write `history.json`."""
        if self.writes:
            _write_json(self.history, history)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `folder`, replacing what is there, only when the block is done."""
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _at(content: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content
