"""What reaches stdout under --json: the JSON object, whatever libraries print."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import os
from fvlm_cli.output import Output
out = Output(json={json})
out.keep_stdout()
print("printed by a library")
os.write(1, b"written by one from C\\n")
out.result({{"steps": 4}}, lambda console: console.print("4 steps"))
"""


def run(*, json: bool) -> tuple[str, str]:
    command = [sys.executable, "-c", PROGRAM.format(json=json)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout, done.stderr


def test_under_json_what_libraries_print_goes_to_stderr() -> None:
    stdout, stderr = run(json=True)
    assert json.loads(stdout) == {"steps": 4}
    assert {"printed by a library", "written by one from C"} <= set(stderr.splitlines())


def test_for_people_stdout_stays_as_it_is() -> None:
    stdout, stderr = run(json=False)
    assert set(stdout.splitlines()) == {"printed by a library", "written by one from C", "4 steps"}
    assert stderr == ""
