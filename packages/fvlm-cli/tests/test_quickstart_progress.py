from __future__ import annotations

import io
import itertools
import re

from rich.console import Console

from fvlm_cli.quickstart.progress import LineWatcher, ProgressWatcher


def test_lines_at_every_quarter():
    lines: list[str] = []
    watcher = LineWatcher(lines.append)
    watcher.begin("Train", 40)
    for step in range(40):
        watcher.advance(note=f"loss {step}")
    watcher.begin("Save", 2)
    watcher.advance(2)
    assert lines == ["Train …", "  10 of 40 loss 9", "  20 of 40 loss 19", "  30 of 40 loss 29", "Save …"]


def test_a_bar_with_the_time_left():
    text = io.StringIO()
    clock = itertools.count(0.0, 10.0)  # every look at it is ten seconds after the last
    console = Console(file=text, force_terminal=True, width=80, get_time=lambda: next(clock))
    with ProgressWatcher(console) as watcher:
        watcher.begin("Train", 4)
        watcher.advance(2)
        watcher.advance(1, note="loss 0.125")
        watcher.refresh()
        during = _last_lines(text)
        watcher.begin("Save", 1)
    after = _last_lines(text)
    assert re.search(r"Train .* 3/4 \d\d:\d\d left loss 0.125", during)
    assert re.search(r"Train .* 4/4 \d\d:\d\d +loss 0.125", after)  # a task that the next one follows is done
    assert re.search(r"Save .* 1/1", after)


def _last_lines(text: io.StringIO) -> str:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    return plain[plain.rindex("Train") :]
