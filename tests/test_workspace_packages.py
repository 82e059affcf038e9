"""The five packages: versions, bounds and licences agree, and a wheel has all that its users need."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
import zipfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "core", "export", "vision", "cli")


def project(package: str) -> dict[str, Any]:
    text = (ROOT / f"packages/fvlm-{package}/pyproject.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["project"])


@pytest.mark.parametrize("package", PACKAGES)
def test_one_version_in_metadata_source_and_changelog(package: str) -> None:
    declared = project(package)["version"]
    folder = ROOT / f"packages/fvlm-{package}"
    tree = ast.parse((folder / f"src/fvlm_{package}/__init__.py").read_text(encoding="utf-8"))
    written = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert written == [declared] == [version(f"fvlm-{package}")]
    assert f"## {declared}" in (folder / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_siblings_are_bounded_to_the_minor_version_that_is_here(package: str) -> None:
    for line in project(package)["dependencies"]:
        if match := re.fullmatch(r"fvlm-(\w+)(.*)", line):
            major, minor, _ = map(int, project(match[1])["version"].split("."))
            assert match[2] == f">={major}.{minor},<{major}.{minor + 1}", line
            assert PACKAGES.index(match[1]) < PACKAGES.index(package), f"{package} → {match[1]} points upwards"


def test_a_library_has_one_lower_bound_and_no_upper_one() -> None:
    bounds: dict[str, set[str]] = defaultdict(set)
    for package in PACKAGES:
        for line in project(package)["dependencies"]:
            name = re.split(r"[^\w-]", line)[0]
            if not name.startswith("fvlm-"):
                bounds[name].add(line)
    assert {name: lines for name, lines in bounds.items() if len(lines) > 1} == {}
    for lines in bounds.values():
        assert re.fullmatch(r"[\w-]+>=[\d.]+(; .*)?", next(iter(lines)))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_carries_the_licence(package: str) -> None:
    assert (ROOT / f"packages/fvlm-{package}/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert project(package)["license"] == "Apache-2.0"


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv to build")
def test_wheels_hold_the_source_its_types_and_the_licence(tmp_path: Path) -> None:
    subprocess.run(["uv", "build", "-q", "--all-packages", "--wheel", "-o", str(tmp_path)], cwd=ROOT, check=True)
    for package in PACKAGES:
        (wheel,) = tmp_path.glob(f"fvlm_{package}-*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        source = ROOT / f"packages/fvlm-{package}/src"
        files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        wanted = {name for name in files if "__pycache__" not in name}
        assert wanted <= names, wanted - names
        assert f"fvlm_{package}/py.typed" in names
        assert any(name.endswith("licenses/LICENSE") for name in names)
        stray = {name for name in names if not name.startswith((f"fvlm_{package}/", f"fvlm_{package}-"))}
        assert stray == set()
