"""Build the documentation site: `python tools/site/build.py` leaves it in site/, `uv run nox -s docs` is what CI runs.

First one folder is made of the pages in docs/, those beside the code and those that are made from the code; then Sphinx
turns it into HTML, with warnings as errors: a link that leads nowhere, a docstring that cannot be read.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from links import rewrite
from messages import messages_page
from reference import API, ROOT, api_page, command_page, config_page

HERE = Path(__file__).resolve().parent
SOURCE = ROOT / ".nox" / "site-source"
OUTPUT = ROOT / "site"
HOME = "docs/README.md"


def shown_pages() -> dict[str, str]:
    """Return repository path → site path of every written page that the site shows."""
    found = {"README.md": "start.md", "CONTRIBUTING.md": "contributing.md", HOME: "index.md"}
    for path in sorted(ROOT.glob("docs/**/*.md")):
        name = path.relative_to(ROOT).as_posix()
        found.setdefault(name, name.removeprefix("docs/"))
    for path in sorted([*ROOT.glob("packages/fvlm-*/*.md"), *ROOT.glob("examples/*/*.md")]):
        name = path.relative_to(ROOT).as_posix()
        found[name] = name
    return found


def made_pages() -> dict[str, str]:
    """Return site path → text of the pages that are made from the code."""
    made = {"config": config_page(), "command": command_page(), "errors": messages_page()}
    made |= {f"api/{package}": api_page(package) for package in API}
    pages = {f"reference/{name}.md": text for name, text in made.items()}
    pages["examples/programs.md"] = _programs_page()
    return pages


def notebooks() -> dict[str, str]:
    """Return repository path → site path of the notebooks."""
    names = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("examples/notebooks/*.ipynb")))
    return {name: name.removesuffix(".ipynb") + ".md" for name in names}


def read_page(source: str) -> str:
    """Return a page's Markdown; of a notebook, its cells as text and blocks of code."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if not source.endswith(".ipynb"):
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells) + "\n"


def _programs_page() -> str:
    lines = ["# The four programs", "", "From `examples/programs`: each runs as it is, and takes `--model`."]
    for path in sorted((ROOT / "examples/programs").glob("*.py")):
        lines += ["", f"## {path.name}", "", f"```python\n{path.read_text(encoding='utf-8')}```"]
    return "\n".join(lines) + "\n"


def sidebar(names: Iterable[str]) -> str:
    """Return the table of contents of the home page.

    Args:
        names: the site's pages without their ending.
    """
    groups = tomllib.loads((HERE / "navigation.toml").read_text(encoding="utf-8"))["group"]
    left = sorted(set(names) - {"index"})
    named = {page for group in groups for page in group["pages"]}
    lines = []
    for group in groups:
        lines += ["", "```{toctree}", ":hidden:", f":caption: {group['caption']}", ""]
        for page in group["pages"]:
            found = [name for name in left if fnmatchcase(name, page) and (name == page or name not in named)]
            lines += found
            left = [name for name in left if name not in found]
        lines.append("```")
    return "\n".join(lines) + "\n"


def assemble(folder: Path) -> None:
    """Write all pages of the site, their links as the site needs them, into an empty folder."""
    shown, made = shown_pages() | notebooks(), made_pages()
    known = shown | {"examples/programs": "examples/programs.md"}
    contents = {place: rewrite(read_page(source), source, known, ROOT) for source, place in shown.items()} | made
    contents["index.md"] += sidebar(name.removesuffix(".md") for name in contents)
    for place, text in contents.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> int:
    """Build the site anew; return Sphinx's exit status."""
    for folder in (SOURCE, OUTPUT):
        shutil.rmtree(folder, ignore_errors=True)
    assemble(SOURCE)
    sphinx = (sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-E")
    return subprocess.run([*sphinx, "-c", str(HERE), str(SOURCE), str(OUTPUT)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
