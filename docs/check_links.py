"""Checks links without a network: of the Markdown pages, and of the built HTML.

usage: python docs/check_links.py [HTML_FOLDER]

Markdown: every relative link names a file of the repository, every anchor a heading of its page.
HTML: the same, and no page loads a script, style, font or image from elsewhere. Addresses of other
sites are not visited.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*$")


def markdown_pages(root: Path = ROOT) -> list[Path]:
    """README and its like, and everything under docs."""
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines outside fenced code, inline code blanked."""
    fence = ""
    for number, line in enumerate(text.splitlines(), start=1):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) else fence
        elif mark:
            fence = mark[1]
        else:
            yield number, line


def slug(heading: str) -> str:
    """The anchor that GitHub, and MyST after it, give a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings; a repeated heading gets -1, -2."""
    found: set[str] = set()
    for _, line in prose(text):
        if match := _HEADING.match(line):
            base = name = slug(match[2])
            count = 0
            while name in found:
                count += 1
                name = f"{base}-{count}"
            found.add(name)
    return found


def links(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of every link and image in the prose."""
    for number, line in prose(text):
        for match in _LINK.finditer(re.sub(r"`[^`]*`", "``", line)):
            yield number, match[1]


def broken_markdown(pages: Iterable[Path], root: Path = ROOT) -> list[str]:
    """Every link that leads nowhere, as `page:line: what`."""
    problems = []
    for page in pages:
        for number, target in links(page.read_text(encoding="utf-8")):
            if reason := _why_broken(page, target, root):
                problems.append(f"{page.relative_to(root)}:{number}: {target}: {reason}")
    return problems


def _why_broken(page: Path, target: str, root: Path) -> str | None:
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return None if parts.hostname and "." in parts.hostname else "names no host"
    if parts.scheme:
        return f"has the scheme {parts.scheme}, wanted https or a relative path"
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not file.is_relative_to(root):
        return "leads out of the repository"
    if not file.exists():
        return "no such file"
    if parts.fragment:
        if file.suffix != ".md":
            return "has an anchor, but is no page"
        if parts.fragment not in anchors(file.read_text(encoding="utf-8")):
            return "no such heading"
    return None


class _Page(HTMLParser):
    """The ids, links and loaded resources of one HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])


def broken_html(folder: Path) -> list[str]:
    """Every link of the built pages that leads nowhere, and everything loaded from elsewhere."""
    pages = {
        path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")
    }
    problems = [] if pages else [f"{folder}: no pages"]
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        for target in page.loaded:
            parts = urlsplit(target)
            if parts.scheme == "data":
                continue
            if parts.netloc:
                problems.append(f"{name}: loads {target} from elsewhere")
            elif not (path.parent / unquote(parts.path)).exists():
                problems.append(f"{name}: {target}: no such file")
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.exists():
                problems.append(f"{name}: {target}: no such file")
            elif (
                parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].ids
            ):
                problems.append(f"{name}: {target}: no such anchor")
    return problems


def main(arguments: list[str]) -> int:
    """Print every problem; 0 when there is none."""
    problems = broken_html(Path(arguments[0])) if arguments else broken_markdown(markdown_pages())
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
