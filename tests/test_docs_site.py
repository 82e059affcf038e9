"""The documentation site: its links hold on the forge and on the site, and its reference pages have all of the code."""

from __future__ import annotations

import html
import importlib
import re
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from build import made_pages, notebooks, read_page, shown_pages, sidebar
from links import LinkError, prose, resolve, rewrite, targets
from messages import kinds, messages, messages_page
from pydantic import BaseModel
from reference import API, api_page, command_page, config_page

from fvlm_cli.config.schema import TrainConfig
from fvlm_cli.main import app

ROOT = Path(__file__).resolve().parent.parent


def written() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as forges and MyST make them."""
    headings = [
        line.lstrip("#").strip()
        for is_prose, piece in prose(page.read_text(encoding="utf-8"))
        if is_prose
        for line in piece.splitlines()
        if re.match(r"#{1,6} ", line)
    ]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*written(), *notebooks()])
def test_links_hold_on_the_forge(page: str) -> None:
    for target in targets(read_page(page)):
        name, _, anchor = target.partition("#")
        path = ROOT / resolve(page, name)
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page} links to {target}"


def test_links_are_rewritten_for_the_site() -> None:
    pages = {"docs/data.md": "data.md", "README.md": "start.md", "packages/fvlm-cli/README.md": "cli.md"}

    def on_the_site(text: str, page: str = "docs/data.md") -> str:
        return rewrite(text, page, pages, ROOT)

    assert on_the_site("[a](../packages/fvlm-cli)") == "[a](cli.md)"
    assert on_the_site("[a](../README.md#how-fast) [b](https://x.org) [c](#d)") == (
        "[a](start.md#how-fast) [b](https://x.org) [c](#d)"
    )
    assert on_the_site("[Data](docs/data.md)", "README.md") == "[Data](data.md)"
    assert on_the_site("[`LICENSE`](../LICENSE), [all](../tools)") == "`LICENSE`, all"
    code = "```python\nx[0](absent.md)\n```\n"
    assert on_the_site(code) == code
    with pytest.raises(LinkError, match=r"docs/data.md links to absent.md, and there is no docs/absent.md"):
        on_the_site("see [this](absent.md)")


def test_every_page_is_in_the_sidebar_once() -> None:
    names = {place.removesuffix(".md") for place in [*shown_pages().values(), *notebooks().values(), *made_pages()]}
    names |= {"new-page"}
    listed = [line for line in sidebar(names).splitlines() if line and line[0] not in ":`"]
    assert sorted(listed) == sorted(names - {"index"})
    assert listed[:3] == ["start", "tutorial", "examples/notebooks/digits"]
    assert "new-page" in listed[-20:]


def sections(kind: Any, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every section that a config may hold, with what stands before its keys on the page."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield prefix, kind
        for name, field in kind.model_fields.items():
            yield from sections(field.annotation, f"{name}." if kind is TrainConfig else "")
    for inner in typing.get_args(kind):
        yield from sections(inner)


def test_the_config_page_has_every_key() -> None:
    rows = {line.split(" | ")[0].strip("| "): line for line in config_page().splitlines() if line.startswith("| `")}
    found = {
        prefix + name: field for prefix, kind in sections(TrainConfig) for name, field in kind.model_fields.items()
    }
    keys = {name: field for name, field in found.items() if name not in TrainConfig.model_fields}
    assert set(rows) == {f"`{name}`" for name in keys}
    for name, field in keys.items():
        assert " ".join((field.description or "?").split()).replace("|", "\\|") in rows[f"`{name}`"]
    assert rows["`lora.r`"] == "| `lora.r` | whole number ≥ 1, ≤ 65536 | `16` | Rank. |"
    assert "`4bit`, `8bit`, `16bit`, `full` or null | `null`" in rows["`model.precision`"]
    assert "mapping with the keys of [SourceSection](#sourcesection) | required" in rows["`data.train`"]


def test_the_command_page_has_every_verb_and_option() -> None:
    page = html.unescape(command_page())
    parts = dict(zip(*[iter(re.split(r"^## `fvlm (\w+)`$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert list(parts) == list(verbs)
    for name, verb in verbs.items():
        for parameter in verb.params:
            assert " ".join((parameter.help or "").split()) in " ".join(parts[name].split()), (name, parameter.name)
            assert all(option in parts[name] for option in parameter.opts if option.startswith("-"))


@pytest.mark.parametrize("package", API)
def test_the_api_page_has_every_public_name(package: str) -> None:
    module = importlib.import_module(f"fvlm_{package}")
    documented = re.findall(r"\.\. auto(class|function):: (\S+)", api_page(package))
    names = set(module.__all__) - {"__version__"}
    assert {path for _, path in documented} == {f"fvlm_{package}.{name}" for name in names}
    for kind, path in documented:
        assert isinstance(getattr(module, path.rpartition(".")[2]), type) == (kind == "class"), path


def test_the_page_of_messages_has_every_class_and_what_is_raised() -> None:
    found = {(message.error, message.text) for message in messages()}
    assert {message.error for message in messages()} == set(kinds())
    assert ("ConfigError", "data.eval and data.eval_fraction are both given; leave one of them out.") in found
    assert ("DataError", "{path} holds no rows; give a file that does.") in found
    assert all(f"## {name}\n" in messages_page() for name in kinds())
