"""Command lines that Typer itself cannot read, and ends that no verb sees: one sentence, code 2, JSON under --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fvlm_cli.main import app

WRONG = [
    (("train", "c.yaml", "--nproc", "x"), "train: --nproc is 'x'; give a whole number, 1 or more."),
    (("train", "c.yaml", "--nproc=0"), "train: --nproc is '0'; give a whole number, 1 or more."),
    (
        ("infer", "m", "--max-new-tokens", "1e400"),
        "infer: --max-new-tokens is '1e400'; give a whole number from 1 to 1000000.",
    ),
    (("infer", "m", "--temperature", "-1"), "infer: --temperature is '-1'; give a number, 0.0 or more."),
    (("infer", "m", "--top-p", "3"), "infer: --top-p is '3'; give a number from 0.0 to 1.0."),
    (("init", "--data", "foldr"), "init: --data is 'foldr'; did you mean folder?"),
    (("eval", "m", "c.yaml", "--precision", "4bits"), "eval: --precision is '4bits'; did you mean 4bit?"),
    (("init", "c.yaml", "--famly", "x"), "init: --famly is no option; did you mean --family?"),
    (("train", "c.yaml", "--nprocs", "2"), "--nprocs is no option, nor a key"),
    (("train", "c.yaml", "--nprocs", "2"), "did you mean --nproc?"),
    (("estimate", "c.yaml", "--imge=64x64"), "did you mean --image?"),
    (("infer", "m", "--image"), "infer: --image lacks its value; it means: An image"),
    (("env", "--debug=3"), "env: --debug takes no value; write --debug alone."),
    (("infer",), "infer: MODEL is missing; it means: Folder or Hub id"),
    (("train",), "train: CONFIG.yaml is missing; it means: What to train"),
    (("merge", "a"), "merge: --output is missing; it means: The folder to write."),
    (("chat", "m", "two words"), "two words"),
    (("trian",), "'trian' is no verb of fvlm; did you mean train?"),
    (("--resume",), "--resume stands before the verb; write fvlm VERB --resume"),
]


@pytest.mark.parametrize(
    ("words", "sentence"), WRONG, ids=lambda value: " ".join(value) if type(value) is tuple else ""
)
def test_a_wrong_command_line_gets_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "20"})  # a box would break its words
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fvlm: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    machine = CliRunner().invoke(app, [words[0], "--json", *words[1:]])
    assert machine.exit_code == 2
    found = json.loads(machine.stdout)
    assert sentence in found["error"]
    assert found["exit_code"] == 2
    assert machine.stderr == f"fvlm: {found['error']}\n"


def test_the_console_script_has_the_same_handler(fvlm, tmp_path: Path) -> None:
    done = fvlm("train", "c.yaml", "--nproc", "x", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert json.loads(done.stdout) == {
        "error": "train: --nproc is 'x'; give a whole number, 1 or more.",
        "exit_code": 2,
    }
    assert done.stderr == "fvlm: train: --nproc is 'x'; give a whole number, 1 or more.\n"
    done = fvlm("train", "c.yaml", "--nproc", "x", "--debug", cwd=tmp_path)
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("fvlm: train: --nproc is 'x'; give a whole number, 1 or more.\n")


def test_after_two_dashes_json_is_no_option() -> None:
    done = CliRunner().invoke(app, ["env", "--", "--json"])
    assert done.exit_code == 2
    assert done.stdout == ""


def test_help_and_version(fvlm, tmp_path: Path) -> None:
    for words in (("--help",), ("train", "--help"), ("train", "--json", "--help")):
        done = fvlm(*words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: fvlm" in done.stdout
    done = fvlm("--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fvlm 0.")
    done = fvlm(cwd=tmp_path)
    assert done.returncode == 2  # no verb was given
    assert "Usage: fvlm" in done.stdout


@pytest.mark.parametrize("words", [["train", "--schema"], ["version", "--json"], ["--help"]])
def test_a_reader_that_goes_is_no_error(fvlm_command: list[str], words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*fvlm_command, *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_closed_stdout_is_no_error(fvlm_command: list[str]) -> None:
    script = " ".join([*fvlm_command, "version", "--json", ">&-"])
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


BUG = """
import typer
from fvlm_cli.main import app
from fvlm_cli.verb import verb

def boom(*, out) -> None:
    "Fail."
    {statement}

app.command("boom")(verb(boom))
app()
"""


def boom(statement: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUG.format(statement=statement), "boom", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_bug_is_one_sentence_too() -> None:
    done = boom("out.keep_stdout(); print('noise'); {}['a\\nb']", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["exit_code"] == 1
    assert found["error"].startswith("a bug of fvlm (KeyError: 'a\\nb'; <string>, line 8)")
    assert done.stderr == f"noise\nfvlm: {found['error']}\n"
    done = boom("{}['a']", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "--debug" in done.stderr.splitlines()[-1]


def test_an_input_that_ends_and_ctrl_c() -> None:
    done = boom("raise EOFError")
    assert done.returncode == 2
    assert done.stderr.strip() == "fvlm: the input ended before there was an answer."
    done = boom("raise KeyboardInterrupt", "--json")
    assert done.returncode == 130
    assert json.loads(done.stdout) == {"error": "stopped by Ctrl-C.", "exit_code": 130}
