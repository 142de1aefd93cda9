"""The page's sections, one function each: data in, HTML out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from qwt_fx.inspect.page import svg
from qwt_fx.inspect.page.data import STAGES, Absent, ChannelRanges, PageData, TowerData
from qwt_fx.inspect.page.tables import folded, layers_table, skips_table
from qwt_fx.measure.layer_statistics import LevelHistogram

LAYERS_SHOWN = 6  # layers with charts of their own, a tower
MOST_LEVELS = 32  # more would be a grey area


def missing(what: str, absent: Absent) -> str:
    """A box in the place of a chart."""
    return (
        f'<div class="card missing"><h3>{breakable(what)}</h3>'
        f"<p>Not measured: {escape(absent.text)}.</p></div>"
    )


def card(title: str, content: str, legend: Mapping[str, str] | None = None, note: str = "") -> str:
    """A box with a chart; legend: class -> text."""
    keys = "".join(
        f'<span><i class="{kind}"></i>{escape(t)}</span>' for kind, t in (legend or {}).items()
    )
    below = f'<p class="soft">{escape(note)}</p>' if note else ""
    key = f'<div class="legend">{keys}</div>' if keys else ""
    return f'<div class="card"><h3>{breakable(title)}</h3>{key}{content}{below}</div>'


def breakable(name: str) -> str:
    """Escaped text whose long names may break behind a dot."""
    return escape(name).replace(".", ".<wbr>")


def grid(cards: Sequence[str]) -> str:
    """Boxes beside each other where there is room."""
    return f'<div class="grid">{"".join(cards)}</div>'


def facts(page: PageData) -> str:
    """The figures to see first."""
    boxes = []
    for tower in page.towers:
        known = [r["sqnr_db"] for r in tower.rows if r["sqnr_db"] is not None]
        quantized = sum(r["w_bits"] is not None for r in tower.rows)
        boxes.append((f"{tower.name}: layers quantized", f"{quantized} of {len(tower.rows)}"))
        if known:
            value = f"{statistics.median(known):.1f} dB"
            boxes.append((f"{tower.name}: median SQNR of a layer", value))
    size = {} if isinstance(page.size, Absent) else page.size
    small, large = size.get("quantized"), size.get("FP32")
    if small and large:
        boxes.append(("size", f"{small / 1e6:.2f} MB, 1/{large / small:.1f} of FP32"))
    boxes.append(("calibration pairs measured on", str(page.samples or "none")))
    facts = (
        f'<div class="fact"><span class="soft">{escape(k)}</span><b>{escape(v)}</b></div>'
        for k, v in boxes
    )
    return f'<div class="facts">{"".join(facts)}</div>'


def layers(tower: TowerData) -> str:
    """The table of layers."""
    note = "The layer that adds most to the error of the model's output comes first."
    if isinstance(tower.values, Absent):
        note = (
            "Figures are those recorded at calibration; the layer with the largest error of its own "
            f"comes first. Error contributed: not measured, {tower.values.text}."
        )
    return f'<p class="soft">{escape(note)}</p>{layers_table(tower.rows)}'


def blocks(page: PageData, tower: TowerData) -> str:
    """SQNR and R2 of each block."""
    names = [b["name"] for b in tower.blocks]
    labels = [_short(n) for n in names]
    cards = []
    title = "SQNR behind each block"
    if not names:
        return '<p class="soft">No transformer blocks were found.</p>'
    if isinstance(tower.stages, Absent):
        cards.append(missing(title, tower.stages))
    else:
        found = tower.stages
        series = {s: [found[s].get(n) for n in names] for s in STAGES if s in found}
        chart = svg.lines(title, labels, series, "block", "SQNR (dB)")
        legend = {f"s{i}": s for i, s in enumerate(series)}
        note = "Against the floating-point model, errors of earlier blocks included."
        if page.config.get("recipe") == "best" and not any(b["applied"] for b in tower.blocks):
            note += " QwT is not part of this model: measured for comparison."
        cards.append(card(title, chart, legend, note))
    title = "QwT: explained part of each block's error"
    if any(b["r2"] is not None for b in tower.blocks):
        series = {
            "R² on fitted samples": [b["r2"] for b in tower.blocks],
            "R² on held-out samples": [b["r2_held_out"] for b in tower.blocks],
        }
        chart = svg.bars(title, labels, series, "block", "R² (share)")
        cards.append(card(title, chart, {"s0": "fitted samples", "s1": "held-out samples"}))
    else:
        cards.append(
            f'<div class="card missing"><h3>{title}</h3><p>This tower has no compensation: '
            "quantize it with --compensation qwt.</p></div>"
        )
    return grid(cards)


def _short(name: str) -> str:
    parts = [p for p in name.split(".") if p.isdigit()]
    return parts[-1] if parts else name.rpartition(".")[2]


def channel_ranges(tower: TowerData) -> str:
    """Extremes of each channel in front of the layers with the most uneven ones."""
    if isinstance(tower.ranges, Absent):
        return grid([missing("Ranges before and after", tower.ranges)])
    if not tower.ranges:
        return '<p class="soft">No norm of this tower was reparameterized.</p>'
    chosen = sorted(tower.ranges, key=lambda r: -r.unevenness)[: LAYERS_SHOWN // 2]
    note = (
        f"The {len(chosen)} of {len(tower.ranges)} norm outputs whose channels differed most; "
        "channels in the order of their width before."
    )
    cards = [c for one in chosen for c in _range_cards(one)]
    return f'<p class="soft">{note}</p>{grid(cards)}'


def _range_cards(one: ChannelRanges) -> list[str]:
    widths = [b - a for a, b in zip(one.before_low, one.before_high, strict=True)]
    order = sorted(range(len(widths)), key=lambda i: -widths[i])
    cards = []
    for title, kind, low, high in (
        ("before", "s1", one.before_low, one.before_high),
        ("after", "s0", one.after_low, one.after_high),
    ):
        chart = svg.ranges(
            f"{one.layer}, input {title} reparameterization",
            [low[i] for i in order],
            [high[i] for i in order],
            "channel, widest before first",
            "value",
            kind,
        )
        cards.append(card(f"{one.layer}: {title}", chart, {kind: "least to largest value"}))
    return cards


def histograms(tower: TowerData) -> str:
    """Inputs and weights of the layers that hurt most."""
    names = [r["name"] for r in tower.rows if r["name"] in tower.weights][:LAYERS_SHOWN]
    cards = []
    for name in names:
        if isinstance(tower.values, Absent):
            cards.append(missing(f"{name}: input", tower.values))
        elif name in tower.values:
            cards.append(_values_card(name, tower.values[name]))
        cards.append(_weights_card(name, tower.weights[name]))
    if not cards:
        return '<p class="soft">No layer of this tower has integer weights.</p>'
    return grid(cards)


def _values_card(name: str, one: LevelHistogram) -> str:
    title = f"{name}: input"
    if one.step is None or one.first is None or one.last is None:
        chart = svg.histogram(title, (one.low, one.high), one.counts, (), None, "value")
        return card(title, chart, {"s0": "values, not quantized"})
    count = one.levels or 0
    levels = [one.first + i * one.step for i in range(count)] if count <= MOST_LEVELS else []
    limits = (one.first - one.step / 2, one.last + one.step / 2)
    chart = svg.histogram(title, (one.low, one.high), one.counts, levels, limits, "value")
    legend = {"s0": "values", "clip": "clipped"} | ({"level": "levels"} if levels else {})
    note = (
        f"{count} levels, {svg.number(one.step)} apart, {svg.number(one.first)} to "
        f"{svg.number(one.last)}"
    )
    return card(title, chart, legend, note)


def _weights_card(name: str, one: LevelHistogram) -> str:
    title = f"{name}: weight"
    first, last = round(one.first or 0.0), round(one.last or 0.0)
    chart = svg.histogram(
        title, (one.low, one.high), one.counts, (), None, "level (weight / scale of its row)"
    )
    note = f"{one.levels} levels a row, rows together {first} to {last}; one bar a level"
    return card(title, chart, {"s0": "weights"}, note)


def size_and_latency(page: PageData) -> str:
    """Bars of bytes and of milliseconds."""
    cards = []
    if isinstance(page.size, Absent):
        cards.append(missing("Size of the quantized towers", page.size))
    else:
        values = {"size": [v / 1e6 for v in page.size.values()]}
        chart = svg.bars("Size", list(page.size), values, "stored as", "size (MB)")
        note = ", ".join(f"{name} {value / 1e6:.2f} MB" for name, value in page.size.items())
        cards.append(card("Size of the quantized towers", chart, None, note))
    for tower in page.towers:
        title = f"Latency of the {tower.name} tower, batch 1"
        if isinstance(tower.latency, Absent):
            cards.append(missing(title, tower.latency))
            continue
        values = {"median": [1e3 * v for v in tower.latency.values()]}
        chart = svg.bars(title, list(tower.latency), values, "runtime", "latency (ms)")
        note = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in tower.latency.items())
        cards.append(card(title, chart, None, f"{note}; medians, {page.machine}"))
    return grid(cards)


def reproduce(page: PageData) -> str:
    """The command and the configuration."""
    if page.command is None:
        command = '<p class="soft">The command is not known: the artifact has no report.json.</p>'
    else:
        command = f"<p>The command:</p><pre>{escape(page.command)}</pre>"
    config = json.dumps(page.config, indent=1, ensure_ascii=False)
    return f"{command}<p>The resolved configuration:</p><pre>{escape(config)}</pre>"


def skips(tower: TowerData) -> str:
    """Sites that passes left as they were."""
    if not tower.skips:
        return ""
    return folded(f"{len(tower.skips)} sites left as they were", skips_table(tower.skips))
