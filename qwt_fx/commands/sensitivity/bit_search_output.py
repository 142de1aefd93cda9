"""What `qwt-fx sensitivity` shows and writes: tables, the report, the configuration found."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import torch

from qwt_fx.commands.config_text import config_text
from qwt_fx.commands.screen import Screen, percent
from qwt_fx.commands.sensitivity.bit_search import BitSearch, Trial
from qwt_fx.inspect.report import SCHEMA
from qwt_fx.measure.bit_losses import INPUT, WEIGHT, BitLoss
from qwt_fx.measure.mixed_precision import Choice, by_operand, narrowest, weight_bytes
from qwt_fx.version import __version__


def sqnr_of(error: float) -> float | None:
    """SQNR in dB of a relative squared error; `None` where nothing is lost."""
    return None if error <= 0.0 else -10.0 * math.log10(error)


def show_losses(screen: Screen, losses: Sequence[BitLoss], choice: Choice | None) -> None:
    """The table: a row a group of layers, a column a width of weights and of inputs."""
    operands = by_operand(losses)
    columns = {
        kind: sorted({loss.bits for loss in losses if loss.operand == kind})
        for kind in (WEIGHT, INPUT)
    }
    rows = []
    for layers in dict.fromkeys(loss.layers for loss in losses):
        row = [_title(layers), f"{max(r.elements for r in losses if r.layers == layers):,}"]
        worst = 1.0
        for kind, bits in columns.items():
            known = {r.bits: r for r in operands.get((layers, kind), [])}
            for width in bits:
                loss = known.get(width)
                value = None if loss is None else sqnr_of(loss.error)
                row.append("-" if value is None else f"{value:.1f}")
                if loss is not None and loss.agreement is not None:
                    worst = min(worst, loss.agreement)
        row.append(percent(worst))
        row.append("" if choice is None else _bits_of(layers, choice))
        rows.append(row)
    titles = [f"{kind[0]}{width}\n(dB)" for kind, bits in columns.items() for width in bits]
    titles = [title.replace("i", "a", 1) for title in titles]
    screen.table(
        rows, ("layers alone: output SQNR", "weights", *titles, "least agree-\nment (%)", "chosen")
    )


def _title(layers: tuple[str, ...]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def _bits_of(layers: tuple[str, ...], choice: Choice) -> str:
    parts = [(WEIGHT, "w"), (INPUT, "a")]
    return "".join(
        f"{letter}{choice[layers, kind]}" for kind, letter in parts if (layers, kind) in choice
    )


def show_trials(screen: Screen, trials: Sequence[tuple[str, Trial]]) -> None:
    """A row a whole model that was tried; nothing when there was none."""
    rows = [
        [
            name,
            f"{trial.weight_bytes:,.0f}",
            percent(trial.agreement),
            *(f"{value:.1f}" for value in trial.sqnr_db.values()),
        ]
        for name, trial in trials
    ]
    if rows:
        towers = [f"{tower}\nSQNR (dB)" for tower in trials[0][1].sqnr_db]
        screen.table(
            rows, ("\nplain RepQ-ViT", "weights\n(bytes)", "nearest caption\nkept (%)", *towers)
        )


def report_text(
    args: argparse.Namespace,
    search: BitSearch,
    losses: Sequence[BitLoss],
    choice: Choice | None,
    trials: Sequence[tuple[str, Trial]],
) -> str:
    """Every figure, as JSON text."""
    config = search.config if choice is None else search.config_for(choice)
    document = {
        "schema": SCHEMA,
        "qwt_fx": __version__,
        "torch": torch.__version__,
        "statistics_samples": len(search.statistics[0]),
        "judging_samples": len(search.judges[0]),
        "seed": args.seed,
        "losses": [loss.to_dict() for loss in losses],
        "trials": [{"name": name, **asdict(trial)} for name, trial in trials],
        "weight_bytes": None if choice is None else weight_bytes(losses, choice),
        "config": config.to_dict(),
    }
    return json.dumps(document, indent=1) + "\n"


def found_config(
    search: BitSearch,
    losses: Sequence[BitLoss],
    choice: Choice,
    trial: Trial,
) -> str:
    """The configuration that was found, as TOML text with what each layer costs."""
    lowest = weight_bytes(losses, narrowest(losses))
    head = [
        f"Found by qwt-fx sensitivity {__version__}; every line may be edited.",
        f"Weights searched: {weight_bytes(losses, choice):,.0f} bytes of codes, {lowest:,.0f} at the "
        "narrowest widths.",
        f"Plain RepQ-ViT at these bits keeps {100 * trial.agreement:.1f} % of "
        f"{len(search.judges[0])} nearest captions.",
        "Behind each layer: what it alone costs the output (relative squared error), at the bits "
        "chosen.",
    ]
    notes: dict[str, str] = {}
    for layers in dict.fromkeys(loss.layers for loss in losses):
        chosen = [r for r in losses if r.layers == layers and choice[layers, r.operand] == r.bits]
        text = ", ".join(f"{r.operand} {r.error:.1e}" for r in chosen)
        notes |= dict.fromkeys(layers, text)
    towers = "both" if len(search.towers) == 2 else search.towers[0]
    return config_text(search.config_for(choice), towers, head=head, notes=notes)
