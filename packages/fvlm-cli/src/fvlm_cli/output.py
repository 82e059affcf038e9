"""Where a verb writes: its result to stdout, all else to stderr; for people, or as one JSON object for machines."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class Output:
    """What a verb is given to speak with.

    Args:
        debug: errors come with their traceback, and the log with its details.
        quiet: nothing but the result and errors.
        json: the result, or the error, is one JSON object on stdout.
    """

    _machine: IO[str] | None = None  # the process's own stdout, once nothing else may reach it

    def __init__(self, *, debug: bool = False, quiet: bool = False, json: bool = False) -> None:
        self.debug = debug
        self.quiet = quiet
        self.json = json
        self._stderr: Console | None = None

    @property
    def stderr(self) -> Console:
        """The console of notes and progress. It writes no colour where stderr is not a terminal."""
        if self._stderr is None:
            from rich.console import Console

            self._stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        return self._stderr

    @property
    def interactive(self) -> bool:
        """Whether progress is drawn (a terminal that can move its cursor) or written line by line."""
        return self.stderr.is_terminal and not self.stderr.is_dumb_terminal and not self.quiet

    def note(self, text: str) -> None:
        """Say what is going on."""
        if not self.quiet:
            self.stderr.print(text, markup=False)

    def keep_stdout(self) -> None:
        """Under `json`, let nothing but the JSON object reach this process's stdout.

        What libraries print goes to stderr, from C++ too, as gloo of torch 2.10 does when processes connect.
        """
        stdout = sys.stdout
        if not self.json or self._machine is not None or stdout is not sys.__stdout__ or stdout is None:
            return  # somebody who calls this from Python has put a stdout of their own there
        stdout.flush()
        Output._machine = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(2, 1)

    def _print_json(self, data: Mapping[str, Any]) -> None:
        print(json.dumps(data, ensure_ascii=False), file=self._machine, flush=True)

    def result(self, data: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Give the verb's result: `data` as JSON, or what `show` draws of it."""
        if self.json:
            self._print_json(data)
            return
        from rich.console import Console

        show(Console(highlight=False, soft_wrap=True))

    def error(self, code: int, sentence: str) -> None:
        """Say in one sentence what went wrong."""
        if self.json:
            self._print_json({"error": sentence, "exit_code": code})
        print(f"fvlm: {sentence}", file=sys.stderr)

    def start_log(self) -> None:
        """Let the packages' log reach stderr: warnings, unless `quiet`; everything under `debug`."""
        level = logging.DEBUG if self.debug else logging.ERROR if self.quiet else logging.WARNING
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        for name in ("fvlm_core", "fvlm_export", "fvlm_vision", "fvlm_cli"):
            logger = logging.getLogger(name)
            logger.handlers = [handler]
            logger.setLevel(level)
            logger.propagate = False
        if not self.debug:  # on some CPUs it warns of a package for decoding that nothing here needs
            logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def print_anything() -> None:
    """Let what stdout's encoding lacks, or what is no text, be printed as an escape instead of ending in an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write out what was printed, while a reader that has gone can still be told from a bug."""
    if sys.stdout is not None:  # None where the shell closed it
        sys.stdout.flush()


def leave_quietly() -> int:
    """Let what is still to be written go nowhere, and return the exit code of output that nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    return 1
