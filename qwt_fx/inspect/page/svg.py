"""Charts as SVG text: bars, lines, bands, with titled axes; colours come from the page's style.

Every chart has the same size in its own units, so that its letters are as large as the page's; a
series is told apart by the classes s0, s1, ... that `style` gives a colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 44


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    span = high - low
    if not span > 0.0 or not math.isfinite(span):
        return [low]
    rough = span / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * size >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step + 0.0 for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: at most four significant digits, large and small ones with a power."""
    if value == 0.0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.2g}"


class Chart:
    """One chart under construction: a plane with two axes, and marks on it.

    x and y map data to the chart's units.
    """

    def __init__(
        self,
        name: str,
        x_title: str,
        y_title: str,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
    ) -> None:
        self.name, self.x_title, self.y_title = name, x_title, y_title
        self._x_range, self._y_range = _wide(x_range), _wide(y_range)
        self._marks: list[str] = []
        self._axes: list[str] = []

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        low, high = self._x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        low, high = self._y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def mark(self, text: str) -> None:
        """Add an SVG element."""
        self._marks.append(text)

    def bar(self, left: float, right: float, low: float, high: float, kind: str, tip: str) -> None:
        """A filled rectangle in data units."""
        x, y = self.x(left), self.y(high)
        width, height = max(self.x(right) - x, 0.3), max(self.y(low) - y, 0.0)
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self.mark(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}">{title}</rect>'
        )

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points in data units."""
        text = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        self.mark(f'<polyline class="line {kind}" points="{text}"/>')

    def dot(self, at: tuple[float, float], kind: str, tip: str) -> None:
        """A point with a tip."""
        self.mark(
            f'<circle class="{kind}" cx="{self.x(at[0]):.1f}" cy="{self.y(at[1]):.1f}" r="2.6">'
            f"<title>{escape(tip)}</title></circle>"
        )

    def band(self, lows: Sequence[float], highs: Sequence[float], kind: str) -> None:
        """The area between two lines over 0, 1, 2, ..."""
        there = [f"{self.x(i):.1f},{self.y(v):.1f}" for i, v in enumerate(highs)]
        back = [f"{self.x(i):.1f},{self.y(v):.1f}" for i, v in reversed(list(enumerate(lows)))]
        self.mark(f'<polygon class="{kind}" points="{" ".join(there + back)}"/>')

    def vertical(self, at: float, kind: str) -> None:
        """A line across the plane."""
        x = self.x(at)
        bottom = HEIGHT - BOTTOM
        self.mark(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')

    def x_ticks(self, labels: Sequence[tuple[float, str]]) -> None:
        """Labels under the plane."""
        for value, text in labels:
            self._axes.append(
                f'<text class="tick" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" '
                f'text-anchor="middle">{escape(text)}</text>'
            )

    def y_ticks(self, values: Sequence[float]) -> None:
        """Labels and lines beside the plane."""
        for value in values:
            y = self.y(value)
            self._axes.append(
                f'<line class="gridline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{number(value)}</text>"
            )

    def render(self) -> str:
        """The SVG element."""
        middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        titles = (
            f'<text class="axis" x="{middle_x:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{escape(self.x_title)}</text>"
            f'<text class="axis" transform="rotate(-90)" x="{-middle_y:.0f}" y="13" '
            f'text-anchor="middle">{escape(self.y_title)}</text>'
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.name)}">'
            f"{''.join(self._axes)}{''.join(self._marks)}{titles}</svg>"
        )


def _wide(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _labels(names: Sequence[str], most: int = 12) -> list[tuple[float, str]]:
    every = -(-len(names) // most)
    return [(float(i), name) for i, name in enumerate(names) if i % every == 0]


def lines(
    name: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    x_title: str,
    y_title: str,
) -> str:
    """A line a series over named places; gaps where a value is missing."""
    known = [v for values in series.values() for v in values if v is not None]
    low, high = min([0.0, *known]), max([*known, 1.0])
    chart = Chart(name, x_title, y_title, (-0.4, len(labels) - 0.6), (low, high * 1.05))
    chart.y_ticks(ticks(low, high * 1.05))
    chart.x_ticks(_labels(labels))
    for index, (title, values) in enumerate(series.items()):
        points = [(float(i), v) for i, v in enumerate(values) if v is not None]
        chart.line(points, f"s{index}")
        for at, value in points:
            chart.dot((at, value), f"s{index}", f"{title}, {labels[int(at)]}: {value:.1f}")
    return chart.render()


def bars(
    name: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    x_title: str,
    y_title: str,
    bounds: tuple[float, float] | None = None,
) -> str:
    """Bars of every series beside each other at named places."""
    known = [v for values in series.values() for v in values if v is not None]
    low, high = bounds or (min([0.0, *known]), max([0.0, *known]) * 1.05 or 1.0)
    chart = Chart(name, x_title, y_title, (-0.5, len(labels) - 0.5), (low, high))
    chart.y_ticks(ticks(low, high))
    chart.x_ticks(_labels(labels))
    width = 0.8 / max(len(series), 1)
    for index, (title, values) in enumerate(series.items()):
        for at, value in enumerate(values):
            if value is not None:
                left = at - 0.4 + index * width
                tip = f"{title}, {labels[at]}: {number(value)}"
                ends = min(0.0, value), max(0.0, value)
                chart.bar(left, left + width * 0.92, *ends, f"s{index}", tip)
    return chart.render()


def ranges(
    name: str, lows: Sequence[float], highs: Sequence[float], x_title: str, y_title: str, kind: str
) -> str:
    """Extremes of each channel as a band."""
    chart = Chart(name, x_title, y_title, (0, len(lows) - 1), (min(lows), max(highs)))
    chart.y_ticks(ticks(min(lows), max(highs)))
    chart.x_ticks([(value, number(value)) for value in ticks(0, len(lows) - 1, 4)])
    chart.band(lows, highs, kind)
    return chart.render()


def histogram(
    name: str,
    edges: tuple[float, float],
    counts: Sequence[int],
    levels: Sequence[float],
    limits: tuple[float, float] | None,
    x_title: str,
) -> str:
    """Shares of values in equal bins, in percent; levels as thin lines; beyond the limits marked."""
    total = sum(counts) or 1
    shares = [100.0 * c / total for c in counts]
    low, high = edges
    if limits is not None:
        low, high = min(low, limits[0]), max(high, limits[1])
    chart = Chart(name, x_title, "values (%)", (low, high), (0.0, max(shares) * 1.05))
    chart.y_ticks(ticks(0.0, max(shares) * 1.05, 4))
    for level in levels:
        chart.vertical(level, "level")
    width = (edges[1] - edges[0]) / len(counts)
    for index, share in enumerate(shares):
        left = edges[0] + index * width
        centre = left + width / 2
        outside = limits is not None and not limits[0] <= centre <= limits[1]
        if share > 0.0:
            chart.bar(left, left + width, 0.0, share, "clip" if outside else "s0", "")
    chart.x_ticks([(value, number(value)) for value in ticks(low, high, 4)])
    return chart.render()
