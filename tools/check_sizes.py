"""Check that files and functions stay small enough to be about one idea.

About 300 lines a file and 60 a function is where to stop and think. What is longer with reason stands in
`tools/size_waivers.toml` with that reason and its own limit, so that it cannot grow unseen; a waiver that is no longer
needed is an error, so that the list stays short.

    python tools/check_sizes.py [ROOT]

Counted: every `.py` file in git or about to be, tests included; a function's length is its body without its docstring
and decorators. `@triton.jit` kernels are not measured, nor do they count for their file: one kernel is one idea,
however long.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILE = 300
MAX_FUNCTION = 60
WAIVERS = "tools/size_waivers.toml"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Size:
    """The length in lines of a file ("path") or a function ("path::qualified.name")."""

    where: str
    lines: int
    limit: int


def _is_kernel(function: Function) -> bool:
    targets = [item.func if isinstance(item, ast.Call) else item for item in function.decorator_list]
    return any(ast.unparse(target) == "triton.jit" for target in targets)


def _body_lines(function: Function) -> int:
    first = function.body[0]
    has_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    body = function.body[1:] if has_docstring else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            name = f"{prefix}{child.name}"
            if isinstance(child, Function):
                yield name, child
            yield from _functions(child, name + ".")
        else:
            yield from _functions(child, prefix)


def sizes(path: Path, name: str) -> Iterator[Size]:
    """Yield the size of the file at `path`, which reports call `name`, and of each of its functions."""
    text = path.read_text(encoding="utf-8")
    file_lines = len(text.splitlines())
    for qualified, function in _functions(ast.parse(text, filename=name)):
        if _is_kernel(function):
            file_lines -= (function.end_lineno or 0) - function.lineno + 1
        else:
            yield Size(f"{name}::{qualified}", _body_lines(function), MAX_FUNCTION)
    yield Size(name, file_lines, MAX_FILE)


def judge(found: dict[str, Size], waivers: dict[str, dict[str, object]]) -> list[str]:
    """Return one line for each size over its limit and for each waiver that is wrong or needless."""
    lines = []
    for where, waiver in waivers.items():
        lines_allowed, reason = waiver.get("lines"), waiver.get("reason")
        if not isinstance(lines_allowed, int) or not isinstance(reason, str) or not reason.strip():
            lines.append(f"{WAIVERS}: {where} needs `lines` and a `reason`")
        elif where not in found:
            lines.append(f"{WAIVERS}: {where} does not exist; remove its waiver")
        elif found[where].lines <= found[where].limit:
            lines.append(f"{WAIVERS}: {where} is {found[where].lines} lines and needs no waiver; remove it")
    for size in found.values():
        allowed = waivers.get(size.where, {}).get("lines", size.limit)
        if isinstance(allowed, int) and size.lines > allowed:
            remedy = f"split it by idea, or waive it in {WAIVERS}"
            lines.append(f"{size.where} is {size.lines} lines, over {allowed}: {remedy}")
    return lines


def python_files(root: Path) -> list[str]:
    """Return the `.py` paths below `root` that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", "*.py"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())


def main(arguments: list[str]) -> int:
    """Print what is too long and return 1 if anything is."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    waivers = tomllib.loads((root / WAIVERS).read_text(encoding="utf-8"))
    names = python_files(root)
    try:
        found = {size.where: size for name in names for size in sizes(root / name, name)}
    except SyntaxError as error:
        print(f"{error.filename}:{error.lineno} is not valid Python: {error.msg}")
        return 1
    problems = judge(found, waivers)
    print("\n".join(problems) or f"{len(names)} files are within their limits, {len(waivers)} of them by a waiver")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
