"""Pages of the documentation, run as a reader would: files written, commands and programs executed, in their order.

A fenced block of shell or Python runs. A comment in the line before it says otherwise: `<!-- file: NAME -->` writes the
block's text into that file, `<!-- not run: REASON -->` leaves it out.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fvlm_cli.main import app
from fvlm_cli.quickstart.folders import shipped_checkpoint
from fvlm_cli.quickstart.handwriting import writings

ROOT = Path(__file__).resolve().parent.parent
MODEL = "Qwen/Qwen2-VL-2B-Instruct"  # what the pages name; a `stand_in` is what they get
CODE = ("bash", "python", "json", "yaml", "csv")
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>file|not run): (?P<value>.+?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its line, its language, its text, and what the comment before it says."""

    line: int
    language: str
    text: str
    mark: str | None
    value: str | None

    @property
    def runs(self) -> bool:
        """Whether it is a program or commands to be executed."""
        return self.mark is None and self.language in ("bash", "python")


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("language")) + 1, *found.group("language", "text", "mark", "value"))
        for found in _BLOCK.finditer(text)
    ]


def stand_in(folder: Path) -> Path:
    """Copy the tiny model that fvlm-cli ships, and make of it what is on the Hub: a template that marks no answers."""
    shutil.copytree(shipped_checkpoint(), folder)
    template = folder / "chat_template.jinja"
    marked = template.read_text(encoding="utf-8")
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", marked)
    assert plain != marked
    template.write_text(plain, encoding="utf-8")
    return folder


def scans(folder: Path, count: int = 30) -> None:
    """Write the tutorial's folder: real handwriting, and what is written beside each image."""
    folder.mkdir()
    for number, writing in enumerate(writings(count, 0, test=False)):
        writing.image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(writing.text, encoding="utf-8")


def run_commands(text: str, model: Path) -> list[str]:
    """Run a shell block's `fvlm` commands in this process, with `model` for `MODEL`; return each one's stdout."""
    spoken = []
    for line in text.replace("\\\n", " ").strip().splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if not program:
            continue
        assert program == "fvlm", f"{line!r} is no command of ours: mark its block as not run, with the reason"
        done = CliRunner().invoke(app, [word.replace(MODEL, str(model)) for word in words])
        assert done.exit_code == 0, (line, done.stderr, done.exception)
        spoken.append(done.stdout)
    return spoken


def run_page(page: Path, model: Path, shorter: Mapping[str, str]) -> str:
    """Run a page in the working directory; return all that it printed.

    Args:
        page: the page.
        model: the checkpoint that stands in for `MODEL`.
        shorter: what is replaced in its programs, so that they take seconds.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    for block in blocks(page):
        if block.mark == "file":
            text = block.text.replace(MODEL, str(model))
            Path(str(block.value)).write_text(text, encoding="utf-8")
        elif block.runs and block.language == "bash":
            printed.write("".join(run_commands(block.text, model)))
        elif block.runs:
            # Blank lines in front, so that a traceback names the page's own line.
            program = "\n" * block.line + block.text.replace(MODEL, str(model))
            for long, short in shorter.items():
                program = program.replace(long, short)
            with contextlib.redirect_stdout(printed):
                exec(compile(program, str(page), "exec"), names)
    return printed.getvalue()
