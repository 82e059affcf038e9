"""What the packages import: only what they declare, nothing that is heavy before it is used, and nothing that changes.

The declared names are checked by reading every import statement, those within functions too, so that a package that is
only missed in a rare branch is missed here as well.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "core", "export", "vision", "cli")
DISTRIBUTIONS = {  # where the two names differ
    "PIL": "pillow",
    "cutlass": "nvidia-cutlass-dsl",
    "flash_attn": "flash-attn-4",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def project(package: str) -> dict[str, Any]:
    text = (ROOT / f"packages/fvlm-{package}/pyproject.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["project"])


def imported(package: str) -> Iterator[tuple[str, str]]:
    """Yield (top-level name, place) for every absolute import in a package's source."""
    source = ROOT / f"packages/fvlm-{package}/src"
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                yield from ((alias.name.partition(".")[0], place) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.partition(".")[0], place


def test_what_tests_replace_exists():
    """Also in tests that need a GPU, which nothing here would run into."""
    replaced: dict[str, Path] = {}
    for path in (p for folder in (ROOT / "tests", *ROOT.glob("packages/*/tests")) for p in folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
                target = node.args[0]
                if isinstance(target, ast.Constant) and str(target.value).startswith("fvlm_"):
                    replaced[str(target.value)] = path
    assert replaced
    for name, path in replaced.items():
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            pytest.fail(f"{path.relative_to(ROOT)} replaces {name}, which does not exist")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_declared(package: str) -> None:
    described = project(package)
    extras = [line for lines in described.get("optional-dependencies", {}).values() for line in lines]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in [*described["dependencies"], *extras]}
    own = {f"fvlm_{package}"} | set(sys.stdlib_module_names)
    undeclared = {
        name: place
        for name, place in imported(package)
        if name not in own and DISTRIBUTIONS.get(name, name).replace("_", "-").lower() not in declared
    }
    assert not undeclared


def test_the_kernels_need_torch_and_triton_alone() -> None:
    names = {re.split(r"[^\w-]", line)[0] for line in project("kernels")["dependencies"]}
    assert names == {"torch", "triton"}


_PROBE = """
import json, os, sys, time, warnings, logging
before = (dict(os.environ), list(warnings.filters), logging.root.level, list(logging.root.handlers))
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
after = (dict(os.environ), list(warnings.filters), logging.root.level, list(logging.root.handlers))
heavy = sorted({{"torch", "transformers", "peft", "trl", "datasets"}} & set(sys.modules))
print(json.dumps([seconds, before == after, heavy]))
"""


@pytest.mark.parametrize("module", ["fvlm_core", "fvlm_export", "fvlm_vision", "fvlm_cli"])
def test_importing_is_quick_and_changes_nothing(module: str, tmp_path: Path) -> None:
    fastest = 1e9
    for _ in range(3):  # the machine may be busy: the least of three
        done = subprocess.run(
            [sys.executable, "-c", _PROBE.format(module=module)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, unchanged, heavy = json.loads(done.stdout)
        assert unchanged
        assert heavy == []
        fastest = min(fastest, seconds)
    assert fastest < 1


def test_importing_the_kernels_takes_little_beyond_torch_and_triton(tmp_path: Path) -> None:
    """They are made of the two, and their operators are registered as they are imported."""
    code = "import sys, time, torch, triton; t = time.perf_counter(); before = set(sys.modules); import fvlm_kernels;"
    code += "print(time.perf_counter() - t, {'numpy', 'transformers', 'peft'} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split(" ", 1)
    assert float(seconds) < 1
    assert heavy.strip() == "set()"


@pytest.mark.parametrize("module", ["fvlm_core", "fvlm_export", "fvlm_vision"])
def test_public_names_resolve_and_unknown_ones_do_not(module: str) -> None:
    package = __import__(module)
    for name in package.__all__:
        assert getattr(package, name) is getattr(package, name)
        assert name in dir(package)
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018 (reading it is the test)
