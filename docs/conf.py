"""The documentation site: ``make docs`` builds it into build/docs, without a network, warnings as errors."""

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import longnet  # noqa: E402

project = "longnet"
author = "the authors of longnet"
version = release = longnet.__version__
html_title = f"longnet {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "extensions.docstrings",
    "extensions.mathml",
    "extensions.notebooks",
    "extensions.outside",
]
html_theme = "furo"
html_copy_source = False

# A page of the reference is left out where its module cannot be imported: some need an extra.
_MODULES = [path.stem for path in (DOCS / "api").glob("*.md") if path.stem not in ("index", "longnet")]
exclude_patterns = [f"api/{name}.md" for name in _MODULES if importlib.util.find_spec(f"longnet.{name}") is None]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The source says what is public: __all__, in its order; types are in the signatures.
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
