"""The code blocks of the documentation, and the markers that say how each is tested.

A marker is an HTML comment on a line of its own above a block (CONTRIBUTING.md lists them):

    <!-- stand-in: NAME, NAME -->   small local models or files take the place of downloads
    <!-- needs: MODULE, MODULE -->  skipped where a module is not installed
    <!-- slow -->                   the page's Python runs in the slow tier
    <!-- run on the demo -->        commands that the slow tier runs as they are
    <!-- not run: REASON -->        checked as far as reading goes
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from check_links import ROOT, markdown_pages

PROGRAMS = ("qwt-fx", "make", "pip", "python")
_MARKER = re.compile(r"<!--\s*(stand-in|needs|slow|run on the demo|not run)(?::\s*(.*?))?\s*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, first line's number, language, text and markers."""

    page: Path
    line: int
    language: str
    text: str
    markers: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def names(self, marker: str) -> list[str]:
        """The comma-separated names of a marker."""
        return [name.strip() for name in self.markers.get(marker, "").split(",") if name.strip()]

    @property
    def is_shell(self) -> bool:
        """Whether it holds commands: marked so, or not marked and beginning with a program."""
        first = self.text.split(maxsplit=1)[0] if self.text.strip() else ""
        return self.language == "sh" or (self.language == "" and first in PROGRAMS)

    def commands(self) -> Iterator[list[str]]:
        """The words of each command, continued lines joined, comments left out."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found: list[Block] = []
    fence, language, begun, lines = "", "", 0, list[str]()
    markers: dict[str, str] = {}
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        mark = re.match(r"(`{3,})(.*)$", line)
        if fence:
            if mark and mark[1] == fence and not mark[2].strip():
                text = "\n".join(lines) + "\n"
                found.append(Block(page, begun, language, text, markers))
                fence, markers = "", {}
            else:
                lines.append(line)
        elif mark:
            fence, language, begun, lines = mark[1], mark[2].strip(), number + 1, []
        elif marker := _MARKER.fullmatch(line.strip()):
            markers[marker[1]] = marker[2] or ""
        elif line.strip():
            markers = {}  # a marker belongs to the block right below it
    return found


PAGES = markdown_pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
