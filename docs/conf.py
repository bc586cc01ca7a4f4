"""Sphinx makes the pages that GitHub shows, the notebooks and the docstrings into one site: make docs.

The source folder is the repository, so that links between README.md, DESIGN.md and docs/ lead to the same
place on GitHub and on the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode, math, math_block
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator
from typer.testing import CliRunner

import quincunx as qx
from quincunx.cli import app

# lines of help as wide as a phone shows them
os.environ["COLUMNS"] = "80"
ROOT = Path(__file__).resolve().parent.parent

project = "quincunx"
author = "The quincunx developers"
version = release = qx.__version__
root_doc = "README"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "results", "runs", "tests"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

# the navigation: pages by heading, each below README.md
CONTENTS = {
    "Start": ("quickstart", "installing", "own-network", "choosing", "troubleshooting"),
    "Guide": (
        "guide",
        "training-from-scratch",
        *(["training"] if (ROOT / "docs" / "training.md").exists() else []),
        "tasks",
        "deploying",
        "plugins",
        "trained-results",
        "gpus",
        "several-machines",
        "own-method",
    ),
    "Notebooks": ("notebooks/classifier", "notebooks/denoising", "notebooks/samplings"),
    "Method cards": (
        "methods/spatialbottleneck",
        "methods/spatialblock",
        "methods/perforate",
        "methods/espace",
        "methods/lowrank",
        "methods/cp",
        "methods/binaryconnect",
        "methods/qcnn",
    ),
    "Measurements": (
        "how-we-measure",
        "measured/overview",
        "measured/speed",
        "measured/amx",
        "measured/gpu",
        "measured/targets",
        "measured/methods",
        "measured/equal-time",
        "measured/zoo",
        "measured/espace",
        "measured/training",
        "measured/papers",
    ),
    "Reference": ("api/index", "commands"),
    "Project": ("index", "DESIGN", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT"),
}

html_theme = "furo"
html_title = f"quincunx {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False
# of blocks without one; Python would colour the options of commands
highlight_language = "text"
html_theme_options = {"navigation_with_keys": False, "top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "monokai"

# headings as GitHub links to them
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "html_image"]
myst_links_external_new_tab = False

# the site works without a network: formulas are MathML, which browsers show by themselves
html_math_renderer = "mathml"

# what a cache keeps knows only the notebooks, and not the code that they run
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]
python_maximum_signature_line_length = 80
add_module_names = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _add_contents(_: Sphinx, name: str, source: list[str]) -> None:
    """Add what the site alone has: the navigation, which GitHub would show as code, and texts of help."""
    if name == "docs/api/index":
        below = sorted(path.stem for path in (ROOT / "docs" / "api").glob("*.md") if path.stem != "index")
        source[0] += _navigation(below)
    if name == "docs/commands":
        for command in app.registered_commands:
            said = CliRunner().invoke(app, [str(command.name), "--help"], prog_name="quincunx").stdout
            source[0] += f"\n## {command.name}\n\n```text\n{said.strip()}\n```\n"
    if name == root_doc:
        for caption, pages in CONTENTS.items():
            source[0] += _navigation([p if p.isupper() else f"docs/{p}" for p in pages], caption)


def _navigation(pages: list[str], caption: str = "") -> str:
    options = ":hidden:\n" + (f":caption: {caption}\n" if caption else "")
    return f"\n```{{toctree}}\n{options}\n" + "\n".join(pages) + "\n```\n"


def _unlink_folders(sphinx: Sphinx, name: str, source: list[str]) -> None:
    """GitHub shows a folder; a site has no page for it, so that only the words of the link stay."""
    here = Path(sphinx.env.doc2path(name)).parent

    def kept(link: re.Match[str]) -> str:
        return link[1] if (here / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#:]+)\)", kept, source[0])


def _show_formula(translator: HTML5Translator, node: math | math_block) -> None:
    block = isinstance(node, math_block)
    made = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="math">{made}</div>' if block else made)
    raise SkipNode


def _open_at_readme(sphinx: Sphinx, error: Exception | None) -> None:
    """A folder of pages is opened at index.html."""
    if error is None:
        to = f"{root_doc}.html"
        text = f'<!doctype html><title>{project}</title><meta http-equiv="refresh" content="0; url={to}">'
        text += f'<a href="{to}">{to}</a>'
        Path(sphinx.outdir, "index.html").write_text(text + "\n", encoding="utf-8")


def setup(sphinx: Sphinx) -> dict[str, Any]:
    sphinx.add_html_math_renderer("mathml", (_show_formula, None), (_show_formula, None))
    sphinx.connect("source-read", _add_contents)
    sphinx.connect("source-read", _unlink_folders)
    sphinx.connect("build-finished", _open_at_readme)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
