"""The documentation's site: `tools/docs` builds it, every warning an error.

Sphinx with furo and MyST, because it runs notebooks and examples while it builds, takes the docstrings as
they are, checks each reference, and is kept by many; Material for MkDocs is in maintenance mode.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent / "extensions"))
# Triton's interpreter and GPUs change nothing on these pages, threads that spin slow the build.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import mmfast  # noqa: E402

project = "mmfast"
author = "the mmfast authors"
copyright = "2026, the mmfast authors"
version = release = mmfast.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "compared",
    "docstrings",
    "measured",
]
exclude_patterns = ["extensions"]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
# What a notebook writes does not stay among the pages.
nb_execution_in_temp = True
# Progress bars write to the error stream, which is no part of a page.
nb_output_stderr = "remove"

# A single backtick means code, as in docstrings everywhere.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
# Types stand where docstrings tell of them.
napoleon_attr_annotations = False
# Every reference to mmfast leads somewhere; other packages' pages are not asked while this builds.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!mmfast).*")]

html_theme = "furo"
html_title = "mmfast"
html_static_path = ["_static"]
html_css_files = ["mmfast.css"]
html_show_sphinx = False
