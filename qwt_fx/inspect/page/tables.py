"""The page's tables: layers, blocks, sites that were left as they were."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.inspect.page.svg import number

SHOWN = 20  # rows before the rest folds away


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, text: frozenset[int], bad: int = 0
) -> str:
    """A table in a box that scrolls sideways; `text`: columns set left; `bad`: first rows marked."""
    head = "".join(f'<th class="{_side(i, text)}">{escape(h)}</th>' for i, h in enumerate(headers))
    body = []
    for index, row in enumerate(rows):
        cells = "".join(f'<td class="{_side(i, text)}">{escape(c)}</td>' for i, c in enumerate(row))
        body.append(f'<tr class="{"bad" if index < bad else "row"}">{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _side(index: int, text: frozenset[int]) -> str:
    return "text" if index in text else "figure"


def folded(title: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


LAYER_HEADERS = (
    "layer", "bits", "input scale, zero", "weight scale, zero", "clipped (%)", "output SQNR (dB)",
    "error contributed (%)", "kernel", "note",
)  # fmt: skip


def layer_cells(row: JsonObject) -> list[str]:
    """One row of `inspect_rows` as the cells of `LAYER_HEADERS`."""
    note = row["reason"] or ""
    if row["scale_change"] is not None:
        note = f"scale changed x{row['scale_change']:.3g} since calibration. {note}".strip()
    return [
        row["name"],
        bits(row),
        "per token" if row.get("activations") == "dynamic" else _pair(row["input"]),
        _pair(row["weight"]),
        "-" if row["clipped"] is None else f"{100 * row['clipped']:.2f}",
        "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
        "-" if row["contributed"] is None else f"{100 * row['contributed']:.3g}",
        (row["kernel"] or "-").removeprefix("qwt_fx."),
        note,
    ]


def bits(row: JsonObject) -> str:
    """`w4a8`, `w4a8d` of dynamic activations; "-" for a side in floating point, alone when both are."""
    w, a = row["w_bits"], row["a_bits"]
    dynamic = "d" if row.get("activations") == "dynamic" else ""
    return "-" if w is None and a is None else f"w{w or '-'}a{a or '-'}{dynamic}"


def _pair(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{number(value[0])}, {number(round(value[1], 1))}"


def layers_table(rows: Sequence[JsonObject]) -> str:
    """The layers that hurt most, the others folded."""
    cells = [layer_cells(row) for row in rows]
    text = frozenset({0, 1, 7, 8})
    changed = sum(row["scale_change"] is not None for row in rows)
    first = table(LAYER_HEADERS, cells[:SHOWN], text=text, bad=changed)
    if len(cells) <= SHOWN:
        return first
    rest = table(LAYER_HEADERS, cells[SHOWN:], text=text)
    return first + folded(f"{len(cells) - SHOWN} more layers", rest)


def skips_table(skips: Sequence[dict[str, str]]) -> str:
    """What passes left as it was, and why."""
    rows = [[skip["pass"], skip["node"], skip["reason"]] for skip in skips]
    return table(("pass", "site", "reason"), rows, text=frozenset({0, 1, 2}))
