"""The page of inspect: one whole file that requests nothing, fits a phone and titles its axes."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qwt_fx.inspect.page.data import STAGES, Absent, ChannelRanges, PageData, TowerData
from qwt_fx.inspect.page.document import render
from qwt_fx.inspect.page.svg import HEIGHT, WIDTH, number, ticks
from qwt_fx.measure.layer_statistics import LevelHistogram

VOID = {"meta", "link", "wbr", "br"}
NAME = "visual.transformer.resblocks.0.mlp.a_rather_long_layer_name_c_fc"


def _row(name: str, change: float | None = None) -> dict:
    return {
        "name": name, "tower": "image", "w_bits": 4, "a_bits": 8, "sqnr_db": 20.5, "reason": None,
        "input": (0.125, 7.0), "weight": (1e-5, 8.0), "clipped": 0.0125, "contributed": 0.002,
        "scale_change": change, "kernel": "onednn::qlinear_pointwise + quick_gelu + quantize",
    }  # fmt: skip


def _page(*, measured: bool = True, layers: int = 30) -> PageData:
    names = [f"{NAME}{i}" for i in range(layers)]
    blocks = [
        {"name": f"visual.transformer.resblocks.{i}", "r2": 0.1 * i, "r2_held_out": 0.05,
         "applied": True, "parameters": 5}
        for i in range(12)
    ]  # fmt: skip
    weights = {n: LevelHistogram(-8.5, 7.5, tuple(range(16)), 1.0, -8.0, 7.0, 16) for n in names}
    values = {n: LevelHistogram(-3.0, 9.0, tuple(range(72)), 0.5, -2.0, 5.5, 16) for n in names}
    width = [(0.1 * i + 0.1) for i in range(768)]
    low = tuple(-w for w in width)
    ranges = [ChannelRanges(n, low, tuple(width), (-1.0,) * 768, (1.0,) * 768) for n in names[:5]]
    stages = {s: {b["name"]: 10.0 + k for b in blocks} for k, s in enumerate(STAGES)}
    absent = Absent(("--train-data",))
    tower = TowerData(
        "image", [_row(names[0], 50.0), *(_row(n) for n in names[1:])], blocks, weights=weights,
        stages=stages if measured else absent, values=values if measured else absent,
        ranges=ranges if measured else absent, latency={"FP32": 0.0123} if measured else absent,
        skips=[{"pass": "P", "node": "<script>x</script>", "reason": "a & b"}],
    )  # fmt: skip
    return PageData(
        "ViT <b>", "W4/A8", [tower], {"FP32": 4e6, "quantized": 1e6} if measured else absent,
        {"w_bits": 4}, "qwt-fx quantize --x '<y>'", 16 if measured else 0, "1 thread",
    )  # fmt: skip


class _Structure(HTMLParser):
    """Tags that open and close, ids, links, whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.links.append(str(values["href"]))
        elif "href" in values or "src" in values:
            self.fetched.append(str(values.get("href") or values.get("src")))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(text: str) -> _Structure:
    parser = _Structure()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("measured", [True, False])
def test_a_page_is_well_formed_and_requests_nothing(measured: bool) -> None:
    text = render(_page(measured=measured))
    found = _parsed(text)
    assert len(found.ids) == len(set(found.ids)) >= 6
    assert {link.removeprefix("#") for link in found.links} == set(found.ids)
    assert found.fetched == ["data:,"]
    assert not found.tags & {"script", "img", "iframe", "object", "video"}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert len(text.encode()) < 2e6


def test_every_chart_is_valid_svg_with_two_titled_axes_and_marks_inside() -> None:
    charts = re.findall(r"<svg.*?</svg>", render(_page()), flags=re.DOTALL)
    assert len(charts) == 2 + 6 + 12 + 2  # blocks, ranges, values and weights, size and latency
    titles = set()
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.attrib["aria-label"]
        axes = [t.text for t in root.iter("text") if t.attrib["class"] == "axis"]
        assert len(axes) == 2
        assert all(axes)
        titles |= set(axes)
        ticks_shown = [t for t in root.iter("text") if t.attrib["class"] == "tick"]
        assert len(ticks_shown) >= 3
        for rectangle in root.iter("rect"):
            x, y, w, h = (float(rectangle.attrib[k]) for k in ("x", "y", "width", "height"))
            assert -0.5 <= x <= x + w <= WIDTH + 0.5
            assert -0.5 <= y <= y + h <= HEIGHT + 0.5
    units = {"SQNR (dB)", "R² (share)", "values (%)", "size (MB)", "latency (ms)"}
    assert units <= titles


def test_what_was_not_measured_says_which_flag_measures_it() -> None:
    text = render(_page(measured=False))
    assert text.count("Not measured: give --train-data.") == 1 + 1 + 6 + 2
    assert len(re.findall("<svg", text)) == 1 + 6  # R2 and the weights, which need no data


def test_names_are_escaped_and_the_changed_layer_is_marked() -> None:
    text = render(_page())
    assert "<script>x" not in text
    assert "&lt;script&gt;" in text
    assert "ViT &lt;b&gt;" in text
    assert text.count('<tr class="bad">') == 1
    assert "scale changed x50" in text


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-7.0, 13.0, 4) == [-5.0, 0.0, 5.0, 10.0]
    assert ticks(3.0, 3.0) == [3.0]
    assert [number(v) for v in (0.0, 0.25, 1234.56, 1e-7)] == ["0", "0.25", "1235", "1e-07"]


def _chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_in_chromium_nothing_overflows_and_the_console_is_silent(
    width: int, height: int, tmp_path: Path
) -> None:
    chromium = _chromium()
    text = render(_page())
    # What the page itself forbids, a script, measures a copy; in a frame, as windows have a least width.
    probe = (
        "<script>const d = document.scrollingElement; parent.document.body.dataset.size = "
        "[d.scrollWidth, innerWidth, document.querySelectorAll('svg').length, "
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().right > "
        "innerWidth || s.getBoundingClientRect().width < 250).length].join(' ')</script>"
    )
    inner_page = re.sub(r"<meta http-equiv.*?>", "", text).replace("</body>", f"{probe}</body>")
    copy = tmp_path / "copy.html"
    copy.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><iframe width="{width}" '
        f'height="{height}" style="border:0" srcdoc="{escape(inner_page)}"></iframe></body>'
    )
    page = tmp_path / "page.html"
    page.write_text(text)
    common = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}",
        "--enable-logging=stderr",
    ]  # fmt: skip
    seen = subprocess.run(
        [*common, "--dump-dom", str(copy)], capture_output=True, text=True, check=True
    )
    scroll, inner, charts, bad = map(
        int, re.findall(r'data-size="([\d ]+)"', seen.stdout)[0].split()
    )
    assert (inner, charts, bad) == (width, 22, 0)
    assert scroll <= inner
    shot = tmp_path / "shot.png"
    seen = subprocess.run(
        [*common, f"--screenshot={shot}", str(page)], capture_output=True, text=True, check=True
    )
    assert "CONSOLE" not in seen.stderr
    assert shot.stat().st_size > 10_000
