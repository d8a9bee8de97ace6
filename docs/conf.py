"""Sphinx: the pages are Markdown (MyST), the API comes from the docstrings.

Sphinx with furo and MyST, not MkDocs: MkDocs 1 has no maintainer since 2024 and Material for MkDocs gets security fixes
alone; Sphinx, furo and MyST-Parser are released regularly.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kedit_fast

project, author, copyright = "kedit_fast", "the kedit_fast authors", "the kedit_fast authors, MIT licence"
version = release = kedit_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme, html_title = "furo", "kedit_fast"
html_static_path, html_css_files = ["_static"], ["wrap.css"]
html_show_sphinx = False
pygments_style = "friendly"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False
maximum_signature_line_length = 88

PARAMETERS = re.compile(r"^[*\w]+(?:, [*\w]+)*: ")
OF_CODE = re.compile(r"(``.+?``)", re.S)


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """The package's docstrings as reStructuredText: "name: what it is" becomes a list, an indented block stays as it is
    written, everything else is text."""
    paragraphs = "\n".join(lines).strip("\n").split("\n\n")
    made = []
    for paragraph in paragraphs:
        rows = paragraph.split("\n")
        if all(row.startswith("    ") for row in rows):
            made.append("::\n\n" + paragraph)
        elif any(PARAMETERS.match(row) for row in rows):
            made += _listed(rows)
        else:
            made.append(_escaped(" ".join(row.strip() for row in rows)))
    lines[:] = "\n\n".join(made).split("\n")


def _listed(rows: list[str]) -> list[str]:
    items: list[list[str]] = []
    for row in rows:
        if PARAMETERS.match(row) or not items:
            items.append([])
        items[-1].append(row.strip())
    made = []
    for item in items:
        name, _, text = " ".join(item).partition(": ")
        is_named = PARAMETERS.match(item[0])
        made.append(f"- **{_escaped(name)}**: {_escaped(text)}" if is_named else _escaped(" ".join(item)))
    return made


def _escaped(text: str) -> str:
    parts = OF_CODE.split(text)
    return "".join(part if i % 2 else re.sub(r"([\\*|`]|_\b)", r"\\\1", part) for i, part in enumerate(parts))


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_rst)
