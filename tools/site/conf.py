"""Sphinx's settings for the documentation site; tools/site/build.py makes the source folder that it reads."""

from __future__ import annotations

from typing import Any

project = "FVLM"
author = "FVLM's contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

smartquotes = False  # two hyphens before an option stay two

html_theme = "furo"
html_title = "FVLM"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 3
suppress_warnings = [
    "misc.highlighting_failure",  # "…" in an example stands for what is left out
    "myst.header",  # a README may begin at any level
]

# Docstrings are Google style; what they put into backticks is code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a named tuple's fields are members too
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100


def _skip(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave a named tuple's fields to its docstring; their own says only which field they are."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Register what differs from autodoc's ways."""
    app.connect("autodoc-skip-member", _skip)
