"""Sphinx's settings for the slides; `slides.py` writes their sources. Nothing here asks the network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mathjax import MATHJAX, copy_mathjax, number_by_tag_alone
from sphinx.application import Sphinx

project = "minirl_edu"
author = "the minirl_edu authors"
language = "en"
extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx_revealjs"]
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.header"]
mathjax_path = MATHJAX
mathjax3_config = {"tex": {"tags": "none"}, "options": {"enableMenu": False}}

revealjs_static_path = ["static"]
revealjs_css_files = ["slides.css"]
revealjs_js_files = ["slides.js"]
revealjs_style_theme = "white"
revealjs_script_conf = {"width": 1280, "height": 720, "center": False, "hash": True, "slideNumber": True}
revealjs_script_conf |= {"transition": "none", "margin": 0.05}
revealjs_script_plugins = [{"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"}]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", number_by_tag_alone)
    app.connect("build-finished", copy_mathjax)
