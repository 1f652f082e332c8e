"""MathJax for the site and the slides: from a package, with the equations' own numbers."""

import importlib.util
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.fileutil import copy_asset_file

MATHJAX = "tex-svg-full.js"
"""MathJax 3 with its fonts and extensions in one file."""


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
