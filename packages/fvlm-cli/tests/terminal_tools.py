"""A terminal for a command to run in: a pseudo-terminal of a given width, whose user answers what is asked."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What moves the cursor, or colours."""
INTERRUPT = "\x03"
"""Ctrl-C."""


def in_terminal(
    command: Sequence[str],
    cwd: Path,
    *,
    columns: int = 80,
    replies: Sequence[tuple[str, str]] = (),
    timeout: float = 240,
    **environment: str,
) -> tuple[int, str]:
    """Run a command in a terminal; return its exit code and all that the terminal got.

    Args:
        command: to run.
        cwd: where.
        columns: how wide the terminal is.
        replies: what is typed, each when the text before it has appeared behind what was typed last.
        timeout: seconds after which it is killed.
        environment: on top of this process's, of which COLUMNS is taken away.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**inherited, "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it as a signal
    )
    os.close(theirs)
    try:
        text = _converse(ours, list(replies), time.monotonic() + timeout)
        return process.wait(timeout=30), text
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _converse(terminal: int, replies: list[tuple[str, str]], until: float) -> str:
    got, answered = b"", 0
    while time.monotonic() < until:
        if replies and replies[0][0].encode() in got[answered:]:
            answered, typed = len(got), replies.pop(0)[1]
            if typed == INTERRUPT:
                time.sleep(2)  # a signal between its prompt and its read, Python's input() hears behind the next line
            os.write(terminal, typed.encode())
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        got += piece
    return got.decode("utf-8", errors="replace")
