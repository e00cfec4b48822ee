"""Settings of the documentation site: ``sphinx-build -W --keep-going docs docs/_build``."""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from sphinx_gallery.scrapers import figure_rst

sys.path.append(str(Path(__file__).parents[1] / "examples" / "causes"))

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
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/**/*.ipynb", "gallery/**/*.zip"]
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # a scraper is a function, which cannot be cached

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
html_css_files = ["site.css"]
html_js_files = ["tables.js"]
pygments_dark_style = "github-dark"
html_theme_options = {
    "source_repository": "https://github.com/lightning-deadrelu/lightning-deadrelu/",
    "source_branch": "main",
    "source_directory": "docs/",
}


def figures_of(block: Any, block_vars: Any, gallery_conf: Any) -> str:
    """Save what a script of the gallery has drawn, and return the text that shows it."""
    import common

    paths = [next(block_vars["image_path_iterator"]) for _ in common.DRAWN]
    for figure, path in zip(common.DRAWN, paths, strict=True):
        figure.savefig(path, dpi=130)
    common.DRAWN.clear()
    text: str = figure_rst(paths, gallery_conf["src_dir"])
    return text


sphinx_gallery_conf = {
    "examples_dirs": "../examples/causes",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"common\.py",
    "image_scrapers": (figures_of,),
    "reset_modules": (),
    "only_warn_on_example_error": False,
    "show_memory": False,
    "min_reported_time": 1e9,
}
warnings.filterwarnings("ignore", module="sphinx_gallery")
