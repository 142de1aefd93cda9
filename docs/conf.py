"""Sphinx configuration: `make docs` builds build/docs without a network."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

import qwt_fx
from qwt_fx.cli import build_parser

os.environ["COLUMNS"] = "100"  # the width argparse wraps help to

project = "qwt-fx"
release = qwt_fx.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings write names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"qwt-fx {release}"
html_copy_source = False
html_show_sphinx = False

_OUTSIDE = re.compile(r"\[([^\[\]]+)\]\((\.\./[^()\s#]+)(?:#[^()\s]*)?\)")


def outside_links(app: Any, document: str, source: list[str]) -> None:
    """Links to files of the repository that are no pages become downloads."""
    page = Path(app.srcdir, document).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        inside = (page / target).resolve().is_relative_to(Path(app.srcdir).resolve())
        return match[0] if inside else f"{{download}}`{text.replace('`', '')} <{target}>`"

    source[0] = _OUTSIDE.sub(replace, source[0])


class ProgramList(Directive):
    """`{program-list}`: a section a command, with what `qwt-fx COMMAND --help` prints."""

    def run(self) -> list[nodes.Node]:
        """One section a command."""
        commands = next(a for a in build_parser()._actions if a.dest == "command")
        sections: list[nodes.Node] = []
        for name, parser in commands.choices.items():  # type: ignore[union-attr]
            section = nodes.section(ids=[f"qwt-fx-{name}"])
            help_text = parser.format_help()
            section += nodes.title(text=f"qwt-fx {name}")
            section += nodes.literal_block(help_text, help_text, language="text")
            sections.append(section)
        return sections


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_directive("program-list", ProgramList)
    app.connect("source-read", outside_links)
