"""What a command shows: one progress bar a phase on stderr, notes, one table on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from tabulate import tabulate
from tqdm import tqdm

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.evaluate.retrieval import RECALLS


class Screen:
    """Progress bars where stderr is a terminal and `quiet` is off; notes always reach stderr.

    One of several processes speaks; the others' screens are `muted`.
    """

    def __init__(self, quiet: bool = False, *, muted: bool = False) -> None:
        self.muted = muted
        self.bars = not quiet and not muted and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """One line on stderr."""
        if self.muted:
            return
        tqdm.write(f"qwt-fx: {text}", file=sys.stderr)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for one phase; yields update(done, total), total < 0 when it is not known."""
        bar: tqdm[NoReturn] = tqdm(desc=name, disable=not self.bars, file=sys.stderr, leave=True)

        def update(done: int, total: int) -> None:
            if total >= 0:
                bar.total = total
            bar.update(done - bar.n)

        with bar:
            yield update

    def table(self, rows: Sequence[Sequence[object]], headers: Sequence[str]) -> None:
        """A table on stdout."""
        sys.stdout.write(tabulate(rows, headers=headers, disable_numparse=True) + "\n")
        sys.stdout.flush()


def percent(value: float | None) -> str:
    """A fraction as a percentage with two decimals; "-" where nothing was measured."""
    return "-" if value is None else f"{100.0 * value:.2f}"


def points(first: float | None, second: float | None) -> str:
    """second - first in percentage points, signed; "-" where either is missing."""
    return "-" if first is None or second is None else f"{100.0 * (second - first):+.2f}"


def interval(bounds: Sequence[float] | None, sign: float = 1.0) -> str:
    """Two fractions as percentages, low .. high; `sign` -1 turns a drop into a change."""
    if bounds is None:
        return "-"
    low, high = sorted(sign * bound + 0.0 for bound in bounds)  # + 0.0: no "-0.00"
    return f"{percent(low)} .. {percent(high)}"


def megabytes(value: float | None) -> str:
    """Bytes as MB with two decimals."""
    return "-" if value is None else f"{value / 1e6:.2f}"


def decibels(value: float | None) -> str:
    """dB with one decimal."""
    return "-" if value is None else f"{value:.1f}"


def accuracy_rows(report: JsonObject) -> list[list[str]]:
    """Rows FP32 | quantized | delta of what a report holds of accuracies, SQNR, size, seconds."""
    fp32, quantized = report["metrics"]["fp32"], report["metrics"]["quantized"]
    shown = ["acc1", "acc5", "mean_per_class_recall", *RECALLS]
    rows = [_row(f"{key} (%)", fp32[key], quantized[key]) for key in shown]
    rows.append(
        [
            "acc1 95 % interval (%)",
            interval(fp32["acc1_ci"]),
            interval(quantized["acc1_ci"]),
            interval(quantized["acc1_drop_ci"], -1.0),
        ]
    )
    rows.append(["agreement (%)", "", percent(quantized["agreement"]), ""])
    p = quantized["mcnemar"]["p"]
    rows.append(["McNemar p, FP32 against quantized", "", "-" if p is None else f"{p:.2g}", ""])
    rows += _cross_rows(report["metrics"])
    for tower, value in quantized["embedding_sqnr_db"].items():
        rows.append([f"{tower} embedding SQNR (dB)", "", decibels(value), ""])
    size = report["size"]
    ratio = ""
    if size["fp32_bytes"] and size["quantized_bytes"]:
        ratio = f"1/{size['fp32_bytes'] / size['quantized_bytes']:.2f}"
    rows.append(
        ["size (MB)", megabytes(size["fp32_bytes"]), megabytes(size["quantized_bytes"]), ratio]
    )
    total = report["seconds"]["total"]
    rows.append(["seconds", "", "-" if total is None else f"{total:.1f}", ""])
    # What was not measured has no row: dashes all along look like a result.
    return [row for row in rows if set(row[1:]) - {"-", ""}]


def _row(title: str, fp32: float | None, quantized: float | None) -> list[str]:
    return [title, percent(fp32), percent(quantized), points(fp32, quantized)]


def _cross_rows(metrics: JsonObject) -> list[list[str]]:
    """Recall at 1 with one model for the queries and the other for the gallery."""
    titles = {
        "quantized_queries": "quantized queries, FP32 gallery",
        "fp32_queries": "FP32 queries, quantized gallery",
    }
    return [
        _row(f"{key} (%), {titles[side]}", metrics["fp32"].get(key), value)
        for side, figures in metrics["cross_precision"].items()
        for key, value in figures.items()
        if value is not None and key.endswith("@1")
    ]


ACCURACY_HEADERS = ("", "FP32", "quantized", "delta")
