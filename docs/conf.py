"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html` from the root of the repository."""

from __future__ import annotations

import sys
from pathlib import Path

import gateplug

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]  # tests/composition.py is read from the repository

project = "gateplug"
author = "The gateplug developers"
copyright = author
version = release = gateplug.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "composition",
]
exclude_patterns = ["_build", "_ext", "figures", "examples"]
templates_path = ["_templates"]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
suppress_warnings = ["autosummary.import_cycle"]  # modules are listed by their full names on purpose
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a dataclass would be described twice
default_role = "code"  # a name in single backticks, as in the docstrings

html_theme = "furo"
html_title = "gateplug"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
pygments_style = "tango"
