"""An SVG drawing of boxes, lines and words, white, so that it reads in light and dark pages alike."""

from __future__ import annotations

from collections.abc import Sequence

BLUE, ORANGE, GREY, INK = "#2563ab", "#c2570c", "#8a8f98", "#1f2328"
Point = tuple[float, float]


class Drawing:
    """An SVG of a fixed size, white, so that it reads in light and dark pages alike."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = (width, height)
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" '
            f'role="img" font-family="sans-serif" font-size="13">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def text(
        self, x: float, y: float, words: str, *, color: str = INK, anchor: str = "middle"
    ) -> None:
        """Words at a point."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{words}</text>'
        )

    def line(
        self, points: Sequence[Point], color: str, *, width: float = 2.0, dash: str = ""
    ) -> None:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashes}/>'
        )

    def box(self, x: float, y: float, w: float, h: float, words: str, color: str = BLUE) -> None:
        """A rounded box with one line of words."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="6" '
            f'fill="#ffffff" stroke="{color}" stroke-width="1.5"/>'
        )
        self.text(x + w / 2, y + h / 2 + 4.5, words)

    def bar(self, x: float, low: float, high: float, width: float, color: str) -> None:
        """A filled bar between two heights."""
        top, bottom = sorted((low, high))
        self.parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}" '
            f'fill="{color}"/>'
        )

    def arrow(self, start: Point, end: Point, color: str = INK) -> None:
        """A horizontal or vertical arrow."""
        self.line([start, end], color, width=1.5)
        (x, y), across = end, end[1] == start[1]
        step = 6.0 if (end[0] > start[0] if across else end[1] > start[1]) else -6.0
        wings = (
            [(x - step, y - 4), (x - step, y + 4)]
            if across
            else [(x - 4, y - step), (x + 4, y - step)]
        )
        self.line([wings[0], end, wings[1]], color, width=1.5)

    def svg(self) -> str:
        """The file's text."""
        return "\n".join([*self.parts, "</svg>", ""])
