"""Sphinx's settings for the site; `build.py` lays the pages out and calls it. Nothing here asks the network."""

import importlib.util
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset_file

project = "minirl_edu"
author = "the minirl_edu authors"
language = "en"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = []

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the notebooks are stored with their outputs
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables and mathematics in what cells display
# Exercises and API pages go from one heading level to the next but one, which a reader sees and does not mind.
suppress_warnings = ["myst.header"]

html_show_search_summary = False  # they are fetched, which a browser refuses for pages opened from a folder
html_theme = "sphinx_book_theme"
html_title = "minirl_edu"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_theme_options = {"show_toc_level": 2, "use_fullscreen_button": False, "navbar_persistent": []}
html_context = {"default_mode": "auto"}

MATHJAX = "tex-svg-full.js"  # fonts and extensions in the one file
mathjax_path = MATHJAX
# Tags are written out, \tag{3}: MathJax numbers nothing itself.
mathjax3_config = {"tex": {"tags": "none"}, "options": {"enableMenu": False}}


def number_by_tag_alone(app: Sphinx, doctree: nodes.document) -> None:
    """Give display equations their delimiters here: Sphinx would add its own numbers, and `split` around what has \\\\,
    in which \\tag is an error."""
    for node in doctree.findall(nodes.math_block):
        text = node.astext().strip()
        node["no-wrap"] = True
        node.children = []
        node += nodes.Text(rf"\[{text}\]")


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """MathJax 3 from the package sphinx-mathjax-offline: the one file of it that the pages load."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    assert package is not None and package.origin is not None, "not installed: sphinx-mathjax-offline"
    if error is None:
        copy_asset_file(Path(package.origin).with_name("static") / "mathjax" / MATHJAX, app.outdir / "_static")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", number_by_tag_alone)
    app.connect("build-finished", copy_mathjax)
