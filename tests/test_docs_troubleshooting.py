"""`docs/troubleshooting.md`: it has every exit code and error class, and quotes what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from links import prose
from messages import kinds, template

from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.exits import Exit, judge
from fvlm_core.errors import FvlmError

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def quotes(section: str) -> list[str]:
    """Return what the first cells of a section's table quote."""
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [re.match(r"\| `([^`]+)`", row)[1].replace("\\|", "|") for row in rows]  # type: ignore[index]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """All strings of the packages but docstrings, with … for what is put in."""
    found = []
    for path in ROOT.glob("packages/fvlm-*/src/**/*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        documentation = [node.value for node in nodes if isinstance(node, ast.Expr)]
        texts = (template(node) for node in nodes if isinstance(node, ast.expr) and node not in documentation)
        found += [re.sub(r"\{[^{}%\s]*\}", "…", " ".join(text.split())) for text in texts if text]
    return found


@pytest.mark.parametrize("name", [name for name in sections() if name.startswith("Exit code")])
def test_what_is_quoted_is_what_the_code_says(name: str, sentences: list[str]) -> None:
    found = quotes(sections()[name])
    assert found or name == "Exit code 130: Ctrl-C"
    for quote in found:
        pattern = re.compile(".*?".join(map(re.escape, quote.split("…"))))
        assert any(pattern.search(sentence) for sentence in sentences), f"nothing says {quote!r}"


def test_every_exit_code_has_a_section() -> None:
    codes = {int(match[1]) for name in sections() if (match := re.match(r"Exit code (\d+)", name))}
    assert codes == set(Exit) - {Exit.OK}


@pytest.mark.parametrize("name", kinds())
def test_every_error_class_is_in_the_section_of_its_exit_code(name: str) -> None:
    kind: type[FvlmError] = kinds()[name]
    verdict = judge(kind("a reason."))
    assert verdict is not None
    (title,) = (title for title in sections() if title.endswith(name))
    assert title.startswith(f"Exit code {verdict[0].value}")
    assert re.search(rf"^\| {verdict[0].value} \| `{name}`", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("page", ["troubleshooting.md", "command.md", "tutorial.md"])
def test_the_keys_that_it_names_exist(page: str) -> None:
    text = "".join(piece for is_prose, piece in prose((ROOT / "docs" / page).read_text(encoding="utf-8")) if is_prose)
    named = re.findall(r"`(model|lora|data|train|eval|save)\.(\w+)", text)
    assert named
    for section, key in named:
        inner = TrainConfig.model_fields[section].annotation
        assert key in inner.model_fields, f"{section}.{key}"  # type: ignore[union-attr]
