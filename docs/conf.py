"""How Sphinx builds these pages. Offline: no inventory of another project is fetched."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # these pages go with this checkout
import cpseg

project = "cpseg"
author = "the cpseg authors"
copyright = author  # noqa: A001 - Sphinx reads this name
release = version = cpseg.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "cpseg"
html_static_path = ["_css"]
html_css_files = ["fit.css"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autosummary_generate = True
# A name is documented where users import it: a package's page shows what its __all__ brings up.
autosummary_ignore_module_all = False

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Guarantee"]

# pytest runs the examples in docstrings; here run the {doctest} blocks of the pages.
doctest_test_doctest_blocks = ""

nitpicky = True
# Offline there is nothing to link to outside cpseg, and private names have no page.
_others = "|".join(
    sorted({"torch", "numpy", "scipy", "typing_extensions", "matplotlib", *sys.stdlib_module_names})
)
nitpick_ignore_regex = [("py:.*", rf"({_others})\..*"), ("py:.*", r"cpseg\.(.*\.)?_.*")]


def _resolve_top_level_name(app, env, node, contnode):
    """Link ``cpseg.LAC`` to the module that documents it."""
    top, _, rest = node.get("reftarget", "").removeprefix("cpseg.").partition(".")
    if node.get("refdomain") != "py" or top not in cpseg.__all__:
        return None
    home = ".".join(filter(None, (getattr(cpseg, top).__module__, top, rest)))
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], home, node, contnode
    )


def setup(app):
    app.connect("missing-reference", _resolve_top_level_name)
