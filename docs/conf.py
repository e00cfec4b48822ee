"""Settings of the documentation site: ``sphinx-build -W --keep-going docs docs/_build``."""

from __future__ import annotations

import os
from importlib.metadata import version as installed

project = "lightning-deadrelu"
author = "The lightning-deadrelu developers"
copyright = "2026, the lightning-deadrelu developers"
version = release = installed("lightning-deadrelu")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "gallery/**/*.ipynb"]
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
nitpicky = False

# Links into other projects need a network; without one the names stay plain text.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
    }
    if os.environ.get("DOCS_ONLINE")
    else {}
)

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "lightning-deadrelu"
html_static_path = ["_static"]
html_theme_options = {
    "source_repository": "https://github.com/lightning-deadrelu/lightning-deadrelu/",
    "source_branch": "main",
    "source_directory": "docs/",
}
