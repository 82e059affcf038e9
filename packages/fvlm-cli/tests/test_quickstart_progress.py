from __future__ import annotations

import io

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
    with ProgressWatcher(Console(file=text, force_terminal=True, width=160)) as watcher:
        watcher.begin("Train", 4)
        watcher.advance(3, note="loss 0.125")
        watcher.begin("Save", 1)
    last = text.getvalue().split("Train")[-1]
    assert "4/4" in last  # a task that the next one follows is done
    assert "loss 0.125" in last
    assert "left" in last
    assert "1/1" in last
