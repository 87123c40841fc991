"""Sphinx: the settings of the site. `make docs` builds it into build/docs/html."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gallery  # noqa: E402
import mathml  # noqa: E402
import pictures  # noqa: E402

GENERATED = HERE.parent / "build" / "docs" / "generated"  # the pages name this folder

project = author = "jaxwarp"
copyright = "the authors of jaxwarp"
version = release = version_of("jaxwarp")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["**/.ipynb_checkpoints"]
nitpicky = True

# Markdown and notebooks. Notebooks are shown with the outputs that are stored in them.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# Docstrings: Google style, shapes and dtypes in the text. A name in single backticks is a link
# where it is one of this package, else code.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 72
default_role = "py:obj"
copybutton_prompt_text = ">>> "

html_theme = "furo"
html_title = "jaxwarp"
html_static_path = ["_static"]
html_css_files = ["jaxwarp.css"]
html_copy_source = False
html_math_renderer = "mathml"


def setup(app):
    mathml.setup(app)
    # What single backticks name need not be a link: `jax.jit`, `image`.
    app.connect(
        "missing-reference",
        lambda app, env, node, content: content if node.get("reftype") == "obj" else None,
    )
    GENERATED.mkdir(parents=True, exist_ok=True)
    pictures.draw(GENERATED)
    gallery.write(HERE / "notebooks", GENERATED)
