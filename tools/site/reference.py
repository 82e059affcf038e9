"""Reference pages that are made from the code when the site is built, so that they cannot fall behind it.

The config from its schema, the command from typer, the errors from where they are raised; of the Python API only the
list of names, whose docstrings Sphinx reads.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
API = {  # package → what its page says first
    "vision": "What a training program imports. [Data](../../data.md) describes samples and collator in prose.",
    "export": "Merge, verify, save, push. [Export](../../export.md) says what is proved.",
    "core": "Loading, facts of the families, gradient checkpointing, errors.",
    "kernels": "Ops on tensors; [Kernels](../../kernels/README.md) says which to use when.",
}
_KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def config_page() -> str:
    """Return a page with every key of the training config: its type, its default, its meaning."""
    from fvlm_cli.config.schema import TrainConfig

    schema = TrainConfig.model_json_schema()
    lines = [
        "# Every key of the config",
        "",
        "Made from the schema that `fvlm train` checks a config with; `fvlm train --schema` prints it as JSON Schema, "
        "and `fvlm init` writes a config with these explanations in it. Any key can be given on the command line as "
        "`section.key=value` or `--section.key value`.",
    ]
    sections = {name: _reference(field) for name, field in schema["properties"].items()}
    for name, reference in sections.items():
        lines += _section(f"`{name}`", schema["$defs"][reference], prefix=f"{name}.")
    for reference in sorted(set(schema["$defs"]) - set(sections.values())):
        lines += _section(reference, schema["$defs"][reference], prefix="")
    return "\n".join(lines) + "\n"


def _section(title: str, section: dict[str, Any], prefix: str) -> list[str]:
    lines = ["", f"## {title}", "", _one_line(section["description"]), ""]
    lines += ["| key | takes | default | |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        default = "required" if key in section.get("required", []) else f"`{_yaml(field.get('default'))}`"
        cells = (f"`{prefix}{key}`", _kind(field), default, _one_line(field["description"]))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _reference(field: dict[str, Any]) -> str:
    reference: str = field.get("$ref") or field["allOf"][0]["$ref"]
    return reference.rpartition("/")[2]


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(branch) for branch in field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return f"a mapping with the keys of [{_reference(field)}](#{_reference(field).lower()})"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    if field.get("type") == "object":
        return "mapping"
    return _KINDS[field["type"]] + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return f" {', '.join(found)}" if found else ""


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n")
    return text.strip()


def command_page() -> str:
    """Return a page with every verb of `fvlm`, its arguments and options, as typer documents them."""
    documents = ("utils", "docs", "--name", "fvlm", "--title", "The command's options")
    command = (sys.executable, "-m", "typer", "fvlm_cli.main", *documents)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The list of verbs repeats the headings, with their sentences cut off.
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text, count=1)


def api_page(package: str) -> str:
    """Return a page with the public names of a package, for Sphinx's autodoc to fill in."""
    path = ROOT / f"packages/fvlm-{package}/src/fvlm_{package}/__init__.py"
    homes = dict(_homes(ast.parse(path.read_text(encoding="utf-8")), f"fvlm_{package}"))
    lines = [f"# `fvlm_{package}`", "", API[package]]
    for name in sorted(homes, key=lambda item: (homes[item], item)):
        place = f"fvlm_{package}.{name}"  # where users import it from
        directive = f".. autoclass:: {place}\n   :members:" if name[0].isupper() else f".. autofunction:: {place}"
        lines += ["", f"## {name}", "", f"```{{eval-rst}}\n{directive}\n```"]
    return "\n".join(lines) + "\n"


def _homes(tree: ast.Module, package: str) -> Iterator[tuple[str, str]]:
    """Yield each name in `__all__` with the module that its `import` takes it from."""
    (public,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(package)):
            module = f"{package}.{node.module}" if node.level else node.module
            yield from ((alias.name, str(module)) for alias in node.names if alias.name in public)


def _one_line(text: str) -> str:
    return " ".join(text.split())
