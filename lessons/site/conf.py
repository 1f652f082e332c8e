"""Sphinx's settings for the site; `build.py` lays the pages out and calls it. Nothing here asks the network."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

from mathjax import MATHJAX, copy_mathjax, number_by_tag_alone

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

mathjax_path = MATHJAX
# Tags are written out, \tag{3}: MathJax numbers nothing itself.
mathjax3_config = {"tex": {"tags": "none"}, "options": {"enableMenu": False}}


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", number_by_tag_alone)
    app.connect("build-finished", copy_mathjax)
