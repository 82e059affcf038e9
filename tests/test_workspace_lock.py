"""tools/lock_filter.py: what is committed of uv.lock works behind any index."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools/lock_filter.py"

FULL = """\
version = 1
requires-python = ">=3.11"

[[package]]
name = "torch"
version = "2.11.0"
source = { registry = "https://mirror.example/simple" }
dependencies = [
    { name = "sympy" },
]
sdist = { url = "https://mirror.example/torch.tar.gz", hash = "sha256:00", size = 1 }
wheels = [
    { url = "https://mirror.example/torch.whl", hash = "sha256:00", size = 2 },
]

[package.metadata]
requires-dist = [{ name = "sympy" }]

[[package]]
name = "sympy"
version = "1.14.0"
source = { registry = "https://other.example/simple" }
wheels = []
"""

NEUTRAL = """\
version = 1
requires-python = ">=3.11"

[[package]]
name = "torch"
version = "2.11.0"
source = { registry = "." }
dependencies = [
    { name = "sympy" },
]

[[package]]
name = "sympy"
version = "1.14.0"
source = { registry = "." }
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock_filter", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def through(text: str) -> str:
    return subprocess.run([sys.executable, str(TOOL)], input=text, capture_output=True, text=True, check=True).stdout


def graph(text: str) -> list[tuple[str, str | None, list[tuple[str, ...]]]]:
    """Return each package of a lock file with its version and what it needs under which condition."""

    def needs(package: dict[str, Any]) -> list[tuple[str, ...]]:
        kept = ("name", "version", "marker")
        return [tuple(str(item.get(key)) for key in kept) for item in package.get("dependencies", [])]

    return [(one["name"], one.get("version"), needs(one)) for one in tomllib.loads(text)["package"]]


def test_addresses_and_files_go_versions_and_graph_stay() -> None:
    assert through(FULL) == NEUTRAL


def test_it_changes_nothing_the_second_time() -> None:
    assert through(NEUTRAL) == NEUTRAL


def test_the_workspaces_own_lock_comes_out_neutral_and_keeps_every_package(tool: ModuleType, tmp_path: Path) -> None:
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    neutral = through(text)
    assert through(neutral) == neutral
    (tmp_path / "uv.lock").write_text(neutral, encoding="utf-8")
    assert tool.check(tmp_path / "uv.lock") == 0
    assert graph(text) == graph(neutral)


def test_an_address_is_found_and_its_line_named(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "uv.lock"
    path.write_text(FULL, encoding="utf-8")
    assert tool.check(path) == 1
    assert f"{path}:7 " in capsys.readouterr().err


def test_a_changed_lock_must_be_staged(tmp_path: Path) -> None:
    for command in (["git", "init", "-q"], ["git", "config", "user.email", "a@b"], ["git", "config", "user.name", "a"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/lock_filter.py").write_bytes(TOOL.read_bytes())
    (tmp_path / "uv.lock").write_text(NEUTRAL, encoding="utf-8")
    subprocess.run(["git", "add", "uv.lock"], cwd=tmp_path, check=True)
    check = [sys.executable, "tools/lock_filter.py", "--check-staged"]
    (tmp_path / "uv.lock").write_text(FULL, encoding="utf-8")  # what uv makes of the neutral form
    assert subprocess.run(check, cwd=tmp_path, check=False).returncode == 0
    (tmp_path / "uv.lock").write_text(FULL.replace("2.11.0", "2.12.0"), encoding="utf-8")
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "git add uv.lock" in done.stderr
