"""The checks in tools/: each finds what it is there for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    return load("check_sizes")


def body(lines: int) -> str:
    return "".join(f"    x = {number}\n" for number in range(lines))


def test_a_functions_length_is_its_body_without_its_docstring(sizes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        f'class A:\n  @property\n  def f(self):\n    """One.\n\n    Two.\n    """\n{body(7)}', encoding="utf-8"
    )
    found = {size.where: size.lines for size in sizes.sizes(path, "a.py")}
    assert found == {"a.py::A.f": 7, "a.py": 14}


def test_triton_kernels_are_not_measured(sizes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(f"@triton.jit\ndef kernel(x_ptr):\n{body(500)}\ndef f():\n{body(3)}", encoding="utf-8")
    found = {size.where: size.lines for size in sizes.sizes(path, "a.py")}
    assert found == {"a.py::f": 3, "a.py": 6}


def test_what_is_too_long_is_named_unless_waived(sizes: ModuleType) -> None:
    found = {"a.py": sizes.Size("a.py", 301, 300), "a.py::f": sizes.Size("a.py::f", 60, 60)}
    (line,) = sizes.judge(found, {})
    assert line.startswith("a.py is 301 lines, over 300")
    assert sizes.judge(found, {"a.py": {"lines": 301, "reason": "one table"}}) == []
    (grown,) = sizes.judge(found, {"a.py": {"lines": 300, "reason": "one table"}})
    assert "over 300" in grown


def test_a_waiver_must_have_a_reason_and_be_needed(sizes: ModuleType) -> None:
    found = {"a.py": sizes.Size("a.py", 301, 300), "b.py": sizes.Size("b.py", 10, 300)}
    waivers = {
        "a.py": {"lines": 400, "reason": " "},
        "b.py": {"lines": 400, "reason": "one table"},
        "c.py": {"lines": 400, "reason": "one table"},
    }
    lines = sizes.judge(found, waivers)
    assert [line.partition(": ")[2].split(" ")[0] for line in lines] == ["a.py", "b.py", "c.py"]


def test_missing_annotations_are_named_and_triton_is_let_be(tmp_path: Path) -> None:
    tool = load("check_annotations")
    (tmp_path / "a.py").write_text(
        "@triton.autotune(configs=[])\n@triton.jit\ndef kernel(x_ptr, BLOCK: tl.constexpr):\n    pass\n"
        "class A:\n    def f(self, x, *, y: int, **z): return 1\n    def g(self) -> None: return None\n",
        encoding="utf-8",
    )
    (line,) = tool.check(tmp_path)
    assert line.endswith("a.py:6: f lacks annotations: x, z, return")


def test_junit_files_are_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load("count_tests")
    suite = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'
    (tmp_path / "a.xml").write_text(suite.format(10, 1, 1, 2), encoding="utf-8")
    (tmp_path / "b.xml").write_text(suite.format(5, 0, 0, 0), encoding="utf-8")
    assert tool.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == "11 passed, 2 failed, 2 skipped\n"
    (tmp_path / "a.xml").unlink()
    assert tool.main([str(tmp_path)]) == 0
    (tmp_path / "b.xml").unlink()
    assert tool.main([str(tmp_path)]) == 1  # a run without tests is no success
    assert capsys.readouterr().out.endswith("0 passed, 0 failed, 0 skipped\n")
