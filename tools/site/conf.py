"""Sphinx's settings for the documentation site; tools/site/build.py makes the source folder that it reads."""

from __future__ import annotations

project = "FVLM"
author = "FVLM's contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "FVLM"
html_copy_source = False
html_show_sphinx = False

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
