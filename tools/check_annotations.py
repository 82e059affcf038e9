"""Check that every function of `fvlm_kernels` is fully annotated, the bodies of `@triton.jit` functions excepted.

mypy cannot exempt a function by its decorator, so that its configuration leaves missing annotations of that package be
and this check asks for them.

    python tools/check_annotations.py [FOLDER ...]      # default: packages/fvlm-kernels/src
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

_DEFAULT = Path(__file__).resolve().parent.parent / "packages/fvlm-kernels/src"
_JIT = {"triton.jit", "triton.autotune", "triton.heuristics"}  # what these wrap is Triton's language

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_jit(function: Function) -> bool:
    """Tell whether one of the function's decorators is Triton's."""
    targets = [item.func if isinstance(item, ast.Call) else item for item in function.decorator_list]
    return any(ast.unparse(target) in _JIT for target in targets)


def _functions(node: ast.AST) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            if is_jit(child):
                continue
            yield child
        yield from _functions(child)


def missing(function: Function) -> list[str]:
    """Return the names of the parameters without annotation, and "return" where its own is missing."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional and positional[0].arg in {"self", "cls"}:
        positional = positional[1:]
    every = [*positional, *arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]
    names = [argument.arg for argument in every if argument.annotation is None]
    if function.returns is None:
        names.append("return")
    return names


def check(folder: Path) -> list[str]:
    """Return one line for each function below `folder` that lacks annotations."""
    lines = []
    for path in sorted(folder.rglob("*.py")):
        for function in _functions(ast.parse(path.read_text(encoding="utf-8"))):
            if names := missing(function):
                lines.append(f"{path}:{function.lineno}: {function.name} lacks annotations: {', '.join(names)}")
    return lines


def main(arguments: list[str]) -> int:
    """Print what is missing below the folders given and return 1 if anything is."""
    folders = [Path(argument) for argument in arguments] or [_DEFAULT]
    if absent := [folder for folder in folders if not folder.is_dir()]:
        print(f"{absent[0]} is not a folder", file=sys.stderr)
        return 2
    lines = [line for folder in folders for line in check(folder)]
    print("\n".join(lines) or "every function is annotated")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
