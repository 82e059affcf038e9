"""Links between the repository's pages: as the forge follows them → as the site does.

Every page is written for the forge, with links relative to its own file. The site shows the pages of `docs/` and some
from beside the code (READMEs, CONTRIBUTING.md), all of them in one tree, so that links between the two are rewritten.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])+)\]\((?P<target>[^)\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|/")  # another site, a place on this page, an absolute path


class LinkError(ValueError):
    """A link leads to nothing in the repository."""


def prose(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the pieces of a page, in order, each with whether it is prose (True) or a block of code."""
    start = 0
    for fence in _FENCE.finditer(text):
        yield True, text[start : fence.start()]
        yield False, fence.group()
        start = fence.end()
    yield True, text[start:]


def targets(text: str) -> Iterator[str]:
    """Yield the relative targets of a page's links, anchors included."""
    for is_prose, piece in prose(text):
        if is_prose:
            yield from (m["target"] for m in _LINK.finditer(piece) if not _ELSEWHERE.match(m["target"]))


def resolve(page: str, target: str) -> str:
    """Return the repository path of a link's target.

    Args:
        page: repository path of the page that holds the link.
        target: the link, without its anchor.
    """
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def rewrite(text: str, page: str, pages: Mapping[str, str], root: Path) -> str:
    """Return a page's text with its links as they must be on the site.

    A link to a file that the site does not show becomes its text alone: the site knows no address of the repository.

    Args:
        text: the page's Markdown.
        page: its repository path.
        pages: repository path → site path of every page that the site shows, this one included.
        root: the repository.

    Raises:
        LinkError: a link leads to no file of the repository.
    """
    return "".join(
        _LINK.sub(_replacement(page, pages, root), piece) if is_prose else piece for is_prose, piece in prose(text)
    )


def _replacement(page: str, pages: Mapping[str, str], root: Path) -> Callable[[re.Match[str]], str]:
    here = posixpath.dirname(pages[page])

    def replacement(match: re.Match[str]) -> str:
        if _ELSEWHERE.match(match["target"]):
            return match.group()
        name, _, anchor = match["target"].partition("#")
        path = resolve(page, name)
        shown = pages.get(path) or pages.get(f"{path}/README.md")
        if shown is not None:
            place = posixpath.relpath(shown, here or ".")
            return f"[{match['text']}]({place}{'#' if anchor else ''}{anchor})"
        if not (root / path).exists():
            raise LinkError(f"{page} links to {match['target']}, and there is no {path} in the repository")
        return match["text"]

    return replacement
