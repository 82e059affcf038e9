"""Every sentence that FVLM's errors can hold, read from where they are raised."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fvlm_core import errors

ROOT = Path(__file__).resolve().parents[2]
_SENTENCES = "config/contradictions.py"  # its functions return what read_config raises


@dataclass(frozen=True, order=True)
class Message:
    """One sentence. `{name}` in `text` stands for what is put in; `module` is where it is raised."""

    error: str
    module: str
    text: str


def kinds() -> dict[str, type[errors.FvlmError]]:
    """Return the error classes by name, their base left out."""
    found = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    return {n: k for n, k in found.items() if issubclass(k, errors.FvlmError) and k is not errors.FvlmError}


@cache
def messages() -> tuple[Message, ...]:
    """Return the sentences of all packages, sorted by class, module and text."""
    names = set(kinds())
    found: set[Message] = set()
    for path in ROOT.glob("packages/fvlm-*/src/**/*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts[3:])
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {Message(kind, module, text) for kind, text in _raised(tree, names)}
        if str(path).endswith(_SENTENCES):
            returned = (node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value)
            found |= {Message("ConfigError", module, text) for node in returned if (text := template(node))}
    return tuple(sorted(found))


def _raised(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name) and node.func.id in names:
            text = template(node.args[0])
            if text and any(character.isalpha() for character in text.replace("{…}", "")):
                yield node.func.id, text


def template(node: ast.expr) -> str:
    """Return a string expression's text, with `{name}` for what is put in; empty where it is no literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "{…}" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        inner = node.value
        if isinstance(inner, ast.Name):
            return f"{{{inner.id}}}"
        return f"{{{inner.attr}}}" if isinstance(inner, ast.Attribute) else "{…}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "{…}") + (template(node.right) or "{…}")
    return ""


def messages_page() -> str:
    """Return a page with every sentence, by error class."""
    found = messages()
    lines = [
        "# Every error message",
        "",
        f"The {len(found)} sentences that FVLM's own errors can hold, read from the code when this page was built, for "
        "searching; `{…}` stands for what is put in. The command's exit code goes with the class. What to do about the "
        "usual ones: [Troubleshooting](../troubleshooting.md).",
    ]
    for name, kind in sorted(kinds().items()):
        lines += ["", f"## {name}", "", (kind.__doc__ or "").strip().splitlines()[0]]
        modules = sorted({message.module for message in found if message.error == name})
        for module in modules:
            lines += ["", f"### `{module}`", ""]
            texts = (message.text for message in found if (message.error, message.module) == (name, module))
            lines += [f"- `` {' '.join(text.split())} ``" for text in texts]
    return "\n".join(lines) + "\n"
