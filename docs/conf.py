"""How Sphinx makes a site of the documentation: `make docs`."""

from __future__ import annotations

from importlib.metadata import version as version_of
from importlib.resources import files

project = "pl_dendrites"
author = "The pl_dendrites authors"
version = release = version_of("pl_dendrites")
extensions = [
    "myst_parser",
    "notfound.extension",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
# A name that leads nowhere is an error, but for those of other packages and of the package's inner rooms.
nitpicky = True
nitpick_ignore = [("py:exc", "MisconfigurationException")]
nitpick_ignore_regex = [
    (".*", r"(collections|contextlib|lightning|pathlib|pl|torch)\..*|Figure"),
    (".*", r"pl_dendrites\.(core\.(fields|growth|markup|rule|targets)|reporting|saved)\..*"),
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"  # of blocks that do not say theirs
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_title = "pl_dendrites"
html_theme = "pydata_sphinx_theme"
# All that a page needs comes with it: of MathJax, one file.
html_static_path = ["_static", str(files("mathjax") / "static/mathjax/es5/tex-svg.js")]
mathjax_path = "tex-svg.js"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_permalinks_icon = "#"
html_sidebars = {page: [] for page in ("index", "concepts", "layers", "benchmarks", "architecture", "api")}
html_theme_options = {
    "footer_start": [],
    "footer_end": [],
    "header_links_before_dropdown": 7,
    "navigation_with_keys": False,
    "show_prev_next": True,
}
notfound_urls_prefix = "/"
notfound_context = {
    "title": "There is no such page",
    "body": """<h1>There is no such page</h1>
    <p>It may have moved. You can begin at the <a href="/index.html">quick start</a>, look through the
    <a href="/guides/index.html">guides</a> or the <a href="/api.html">API reference</a>, or
    <a href="/search.html">search the documentation</a>.</p>""",
}
