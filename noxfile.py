"""What CI runs, and the sessions around it. `uv run nox` with no argument is what CI runs; `uv run nox -l` lists all.

Every session has an environment of its own, filled by uv from its cache with the versions that `uv.lock` pins, except
`lowest` and `latest`, which resolve anew. Arguments after `--` reach pytest: `uv run nox -s "tests(core)" -- -k load`.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.11"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

# Without bytecode every process of every session would compile torch and transformers anew, for 20 seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# The tests' models are tiny, and threads that wait for each other take longer than one alone: vision's tests took 429 s
# with two threads beside another session on two cores, and 106 s with one beside another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent
PACKAGES = ("kernels", "core", "export", "vision", "cli")  # each may import those before it
RESULTS = ROOT / ".nox" / "results"  # one JUnit file per pytest run; .ci/run adds them up


def pyproject(folder: Path) -> dict[str, Any]:
    """Read a folder's pyproject.toml."""
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def folder(package: str) -> Path:
    """Return the folder of a package."""
    return ROOT / "packages" / f"fvlm-{package}"


def test_tools() -> list[str]:
    """Return the requirements of the root's `test` group: all that tests may use beside their package's own."""
    return nox.project.dependency_groups(pyproject(ROOT), "test")


def video() -> list[str]:
    """Return the requirements of video files: small, and tested wherever FFmpeg is (FVLM_VIDEO=1: it must be)."""
    return list(pyproject(folder("vision"))["project"]["optional-dependencies"]["video"])


def with_siblings(package: str) -> list[str]:
    """Return the package and every sibling that it needs, the lowest first."""
    needed = {package}
    for name in reversed(PACKAGES):
        if name in needed:
            declared = pyproject(folder(name))["project"]["dependencies"]
            needed |= {match[1] for line in declared if (match := re.match(r"fvlm-(\w+)", line))}
    return [name for name in PACKAGES if name in needed]


@functools.cache
def built() -> Path:
    """Build every package once a run, the wheels from their source distributions; return the folder of the wheels."""
    out = ROOT / ".nox" / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["uv", "build", "--quiet", "--all-packages", "--out-dir", str(out)], cwd=ROOT, check=True)
    return out


def wheels(packages: Iterable[str]) -> list[str]:
    """Return the paths of the packages' wheels."""
    return [str(next(built().glob(f"fvlm_{name}-*.whl"))) for name in packages]


def locked(session: nox.Session) -> str:
    """Write the versions that `uv.lock` pins as a constraints file; return its path."""
    out = Path(session.create_tmp()) / "constraints.txt"
    session.run(
        *("uv", "export", "--quiet", "--all-packages", "--all-groups", "--extra", "video", "--no-emit-workspace"),
        *("--no-hashes", "--no-annotate", "--no-header", "--output-file", str(out)),
        external=True,
        silent=True,
    )
    return str(out)


def install_wheels(session: nox.Session, package: str, *others: str) -> None:
    """Install one package and its siblings as a user would, at the pinned versions, and nothing that none declares."""
    needed = with_siblings(package)
    again = [f"--reinstall-package=fvlm-{name}" for name in needed]  # the versions stay while the code changes
    session.install("--constraint", locked(session), *again, *wheels(needed), *others)


def sync(session: nox.Session, *arguments: str) -> None:
    """Fill the session's environment from the workspace and its lock file."""
    environment = {"UV_PROJECT_ENVIRONMENT": session.virtualenv.location}
    session.run_install("uv", "sync", *arguments, env=environment, external=True)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest, leaving its counts for .ci/run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / (re.sub(r"[^a-z0-9]+", "-", session.name.lower()).strip("-") + ".xml")
    report.unlink(missing_ok=True)
    session.run("python", "-m", "pytest", f"--junitxml={report}", *arguments, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    sync(session, "--only-group", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def arrows(session: nox.Session) -> None:
    """Check that the packages import only downwards and that the kernels need torch and triton alone."""
    sync(session, "--only-group", "lint")
    session.run("lint-imports", env={"PYTHONPATH": os.pathsep.join(str(folder(name) / "src") for name in PACKAGES)})


@nox.session(venv_backend="none")
def sizes(session: nox.Session) -> None:
    """Check the lengths of files and functions."""
    session.run(sys.executable, "tools/check_sizes.py", external=True)


@nox.session(venv_backend="none")
def lock(session: nox.Session) -> None:
    """Check that uv.lock answers to the pyproject files and that what is committed of it holds no address."""
    session.run("uv", "lock", "--quiet", external=True)
    session.run(sys.executable, "tools/lock_filter.py", "--check-staged", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy in strict mode; of the kernels' functions all but Triton's are checked."""
    sync(session, "--all-packages")
    session.run("python", "tools/check_annotations.py")
    session.run("mypy", *(str(folder(name) / "src") for name in PACKAGES))


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """Test one package where only what it declares is installed."""
    install_wheels(session, package, *test_tools(), *(video() if package == "vision" else ()))
    pytest(session, str(folder(package) / "tests"))


@nox.session
def integration(session: nox.Session) -> None:
    """Test the packages together, and the workspace itself."""
    sync(session, "--all-packages")
    pytest(session, "tests", "examples")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site into site/, with warnings as errors."""
    sync(session, "--all-packages", "--group", "docs")
    session.run("python", "tools/site/build.py")


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def build(session: nox.Session, package: str) -> None:
    """Build one package's wheel, install it into a fresh environment, import all of it from outside the repository."""
    install_wheels(session, package)
    session.run("uv", "pip", "check", external=True)
    script = str(ROOT / "tools" / "import_all.py")
    session.chdir(session.create_tmp())
    of_extras = ["fvlm_core.flash.kernels"] if package == "core" else []
    session.run("python", "-P", script, f"fvlm_{package}", *of_extras, env={"PYTHONPATH": ""})
    if package == "kernels":  # usable alone
        session.run("python", "-P", str(ROOT / "examples" / "kernels" / "plain_transformer.py"), "--device", "cpu")
    if package == "cli":
        session.run("fvlm", "--help", silent=True)
        session.run("fvlm", "version")


def resolve(session: nox.Session, *arguments: str) -> None:
    """Install all packages and the test tools, with their dependencies resolved anew, free of the workspace's pins."""
    declared = {line for name in PACKAGES for line in pyproject(folder(name))["project"]["dependencies"]}
    libraries = sorted(line for line in declared if not line.startswith("fvlm-"))
    wanted = [*libraries, *video(), *test_tools(), *nox.project.dependency_groups(pyproject(ROOT), "notebooks")]
    with tempfile.TemporaryDirectory() as work, session.chdir(work):  # in the workspace its constraints would hold
        Path("wanted.in").write_text("\n".join(wanted) + "\n", encoding="utf-8")
        compile_ = ("uv", "pip", "compile", "--quiet", "--no-annotate", f"--python={session.virtualenv.location}")
        session.run(*compile_, *arguments, "wanted.in", "-o", "resolved.txt", external=True, silent=True)
        session.log(Path("resolved.txt").read_text(encoding="utf-8"))
        session.install("--requirements", "resolved.txt")
    session.install("--no-deps", "--reinstall", *wheels(PACKAGES))
    session.run("uv", "pip", "check", external=True)


@nox.session(default=False)
def lowest(session: nox.Session) -> None:
    """Test everything with the lowest versions that the packages declare."""
    resolve(session, "--resolution=lowest-direct")
    pinned = "--ignore-glob=tests/test_*_vs_*.py"  # they compare with modules of the very versions that are pinned
    pytest(session, *(str(folder(name) / "tests") for name in PACKAGES), "tests", pinned)


@nox.session(default=False)
def latest(session: nox.Session) -> None:
    """Test everything with the newest versions that the packages allow."""
    resolve(session, "--upgrade")
    pytest(session, *(str(folder(name) / "tests") for name in PACKAGES), "tests")


@nox.session(default=False)
def trackers(session: nox.Session) -> None:
    """Report runs to wandb and trackio themselves; outside the lock, for they hold other packages back."""
    install_wheels(session, "cli", *test_tools())
    session.install("wandb", "trackio")
    session.env["FVLM_TRACKERS"] = "1"
    pytest(session, str(folder("cli") / "tests" / "test_cli_trackers.py"))


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU, and fail where there is none."""
    sync(session, "--all-packages")
    session.env["FVLM_GPU"] = "1"
    pytest(session, *(str(folder(name) / "tests") for name in PACKAGES), "tests", "-m", "gpu")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run one benchmark: `-- kernels.run rms_norm` means `python -m benchmarks.kernels.run rms_norm`."""
    if not session.posargs:
        session.error("name a module below benchmarks/ after --, and its arguments")
    sync(session, "--all-packages")
    module, *arguments = session.posargs
    session.run("python", "-m", f"benchmarks.{module}", *arguments)
