"""The command in a terminal: narrow ones, ones without colour or a cursor, other encodings, and a dialogue."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from terminal_tools import CONTROL, INTERRUPT, in_terminal

from fvlm_cli.bars import progress_bar
from fvlm_cli.output import Output
from fvlm_cli.quickstart.folders import shipped_checkpoint

MODEL = str(shipped_checkpoint())
ADAPTER = "run/adapter"
VERBS = {
    "help": ("train", "--help"),
    "init": ("init", "OUT/new.yaml"),
    "train": ("train", "config.yaml", "save.output_dir=OUT/run", "train.max_steps=2", "eval.rows=2"),
    "preview": ("preview", "config.yaml", "-n", "1", "--html", "OUT/preview.html"),
    "estimate": ("estimate", "config.yaml", "--gpu", "h200"),
    "infer": ("infer", MODEL, "--image", "images", "--prompt", "größer → ✓?", "--max-new-tokens", "4"),
    "eval": ("eval", ADAPTER, "config.yaml", "--output", "OUT/eval"),
    "merge": ("merge", ADAPTER, "--output", "OUT/merged"),
    "report": ("report", "run", "--output", "OUT/report.html"),
    "env": ("env", "--model", MODEL),
    "version": ("version",),
    "quickstart": ("quickstart", "--steps", "2", "--output", "OUT/quickstart"),
    "wrong verb": ("trän",),
    "wrong key": ("train", "config.yaml", "lora.räng=3"),
}
WRONG = ("wrong verb", "wrong key")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_in_a_narrow_terminal_that_knows_ascii_alone(
    fvlm_command: list[str], handwriting_run: Path, tmp_path: Path, name: str
) -> None:
    words = [word.replace("OUT", str(tmp_path)) for word in VERBS[name]]
    command = [*fvlm_command, *words]
    code, text = in_terminal(command, handwriting_run, columns=40, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert code == (2 if name in WRONG else 0), text
    assert "Traceback" not in text
    assert "a bug of fvlm" not in text
    assert text.isascii()


def test_a_dialogue_in_a_terminal(fvlm_command: list[str], handwriting_run: Path) -> None:
    """What is wrong ends nothing; Ctrl-C at the prompt does."""
    replies = [
        ("> ", "/image images/00.png\n"),
        ("> ", "größer ✓\n"),
        ("> ", "/clear\n"),
        ("> ", "/image images/00.png\n"),
        ("> ", "Read the text.\n"),
        ("> ", "/imge x\n"),
        ("> ", "/image nowhere.png\n"),
        ("> ", "\n"),
        ("> ", INTERRUPT),
    ]
    command = [*fvlm_command, "chat", MODEL, "--max-new-tokens", "6"]
    code, text = in_terminal(command, handwriting_run, columns=40, replies=replies)
    assert code == 0, text
    assert "128×32 pixels, shown with the next question" in text
    assert "/imge is no command; did you mean /image?" in text
    assert "nowhere.png" in text
    assert "Traceback" not in text
    answer = text.partition("Read the text.\r\n")[2].partition("\r\n")[0]
    assert answer
    assert not answer.startswith("> ")


def test_questions_in_another_encoding_than_stdin_s(fvlm_command: list[str], handwriting_run: Path) -> None:
    done = subprocess.run(
        [*fvlm_command, "chat", MODEL],
        cwd=handwriting_run,
        input="größer?\n".encode("latin-1"),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 3
    last = done.stderr.decode().strip().splitlines()[-1]
    for part in ("fvlm: ", "utf-8", "PYTHONIOENCODING"):
        assert part in last


def test_no_colour_where_it_is_not_wanted_and_marks_in_its_place(
    fvlm_command: list[str], handwriting_run: Path
) -> None:
    command = [*fvlm_command, "preview", "config.yaml", "-n", "1"]
    _, coloured = in_terminal(command, handwriting_run)
    assert "\x1b[1;32m" in coloured
    assert "⟦" not in coloured
    _, plain = in_terminal(command, handwriting_run, NO_COLOR="1")
    colours = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-9]|9[0-7])(?:;\d+)*m")
    assert colours.search(coloured)
    assert not colours.search(plain)
    assert re.search(r"⟦\d+<\|im_end\|>⟧", CONTROL.sub("", plain))
    _, dumb = in_terminal(command, handwriting_run, TERM="dumb")
    assert "\x1b" not in dumb
    assert re.search(r"⟦\d+<\|im_end\|>⟧", dumb)


def test_a_narrow_terminal_cuts_off_nothing_that_matters(fvlm_command: list[str], handwriting_run: Path) -> None:
    _, text = in_terminal([*fvlm_command, "preview", "config.yaml", "-n", "1"], handwriting_run, columns=40)
    shown = CONTROL.sub("", text)
    assert re.search(r"train\.jsonl, line \d+: \d+ trained, \d+ masked, \d+ media", shown)
    bars = [line for line in shown.splitlines() if "█" in line]
    assert bars
    assert max(map(len, bars)) <= 40


def test_a_terminal_without_a_cursor_gets_lines(fvlm_command: list[str], handwriting_run: Path, tmp_path: Path) -> None:
    words = ("train", "config.yaml", f"save.output_dir={tmp_path / 'run'}", "train.max_steps=2", "eval.rows=1")
    _, text = in_terminal([*fvlm_command, *words], handwriting_run, TERM="dumb")
    assert re.search(r"step 2/2 loss [\d.]+ learning_rate \S+, [\d.]+ s a step, 0:00:0\d left", text)
    assert "\x1b" not in text


@pytest.mark.parametrize("columns", [36, 44, 100])
def test_a_bar_shows_rate_and_time_left_before_all_else(columns: int) -> None:
    now = 0.0
    out = Output()
    text = io.StringIO()
    out._stderr = Console(file=text, force_terminal=True, width=columns, get_time=lambda: now, _environ={})
    with progress_bar(out) as bar:
        task = bar.add_task("training", total=10, completed=2, begun=2, note="loss 1.234 learning_rate 0.0002")
        now = 6.0
        bar.update(task, completed=5)
        bar.refresh()
        lines = CONTROL.sub("", text.getvalue()).replace("\r", "\n").splitlines()
    assert "5/10, 2.0 s each, 0:00:10" in lines[-1]
    assert ("━" in lines[-1]) == (columns == 100)
    assert ("learning_rate 0.0002" in lines[-1]) == (columns == 100)


def test_json_on_a_terminal_is_json_alone(fvlm_command: list[str], handwriting_run: Path, tmp_path: Path) -> None:
    """The prompt of a dialogue would be part of it."""
    log = tmp_path / "out.txt"
    shell = ["sh", "-c", '"$@" > "$0"', str(log), *fvlm_command, "chat", MODEL, "--json", "--max-new-tokens", "3"]
    replies = [("/quit ends", "a\n"), ("a", "\x04")]
    code, text = in_terminal(shell, handwriting_run, replies=replies)
    assert code == 0, text
    (turn,) = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert turn["user"] == "a"


def test_closed_streams_are_no_bug(fvlm_command: list[str], handwriting_run: Path) -> None:
    assert shutil.which("sh")
    for redirection in ("<&-", ">&-", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", *fvlm_command, "chat", MODEL],
            cwd=handwriting_run,
            input="",
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, (redirection, done.stderr)
        assert "bug of fvlm" not in done.stderr
