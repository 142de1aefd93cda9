"""The whole document: a policy that forbids every request, the style, the sections."""

from __future__ import annotations

import re
from html import escape

from qwt_fx.inspect.page import sections
from qwt_fx.inspect.page.data import PageData
from qwt_fx.inspect.page.style import CSS
from qwt_fx.version import __version__

# Nothing may be loaded, and no script runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(page: PageData) -> str:
    """The page as HTML text, UTF-8 when written."""
    parts: list[tuple[str, str, str]] = []  # id, heading, content
    for tower in page.towers:
        name, title = _id(tower.name), tower.name.capitalize()
        for key, heading, content in (
            ("layers", "layers", sections.layers(tower) + sections.skips(tower)),
            ("blocks", "blocks", sections.blocks(page, tower)),
            (
                "ranges",
                "channel ranges before and after reparameterization",
                sections.channel_ranges(tower),
            ),
            ("histograms", "values, weights and their levels", sections.histograms(tower)),
        ):
            parts.append((f"{key}-{name}", f"{title} tower: {heading}", content))
    parts.append(("size", "Size and latency", sections.size_and_latency(page)))
    parts.append(("reproduce", "Configuration and command", sections.reproduce(page)))
    links = "".join(
        f'<a href="#{key}">{escape(title.partition(" before")[0].replace(" tower", ""))}</a>'
        for key, title, _ in parts
    )
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{content}</section>'
        for key, title, content in parts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(page.title)}: qwt-fx inspect</title>'
        f"<style>{CSS}</style></head><body><main><header><h1>{escape(page.title)}</h1>"
        f'<p class="soft">{escape(page.subtitle)}; qwt-fx {__version__}</p></header>'
        f"{sections.facts(page)}<nav>{links}</nav>{body}</main></body></html>\n"
    )


def _id(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
