"""`qwt-fx inspect`: every block, layer and skip of an artifact or a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from qwt_fx.artifact import read_artifact
from qwt_fx.commands.arguments import (
    add_calibration,
    add_common,
    add_model,
    add_quant,
    quant_config,
)
from qwt_fx.commands.inputs import load_batches, load_model
from qwt_fx.commands.pipeline import TOWERS, capture_towers, quantize_towers
from qwt_fx.commands.screen import Screen, decibels
from qwt_fx.errors import ConfigError
from qwt_fx.quantizers import qparams
from qwt_fx.report import block_rows, layer_rows, skip_rows

EXAMPLE = """\
example:
  qwt-fx inspect --artifact vit-b-32-w6a6
"""


def add_parser(commands: Any) -> None:
    """Add the command to the program."""
    parser = commands.add_parser(
        "inspect",
        help="list blocks, layers and skips",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artifact", metavar="DIR", help="what quantize wrote")
    add_model(parser)
    add_calibration(parser)
    add_quant(parser)
    add_common(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    screen = Screen(args.quiet)
    for tower, gm in _graphs(args, screen).items():
        _show(screen, tower, gm)


def _graphs(args: argparse.Namespace, screen: Screen) -> dict[str, GraphModule]:
    """An artifact's towers; or a model's, quantized when calibration data is given."""
    if args.artifact is not None:
        if args.model is not None:
            raise ConfigError("--artifact and --model: inspect takes one of them")
        return dict(read_artifact(Path(args.artifact)).towers)
    model = load_model(args)
    graphs = capture_towers(model, {})
    if args.train_data is None:
        return graphs
    data = load_batches(args, model, screen, 0, None)
    return quantize_towers(model, graphs, data.batches, quant_config(args), TOWERS, screen).towers


def _show(screen: Screen, tower: str, gm: GraphModule) -> None:
    scales = qparams(gm)
    layers = [
        [
            row["name"],
            row["w_bits"] or "-",
            row["a_bits"] or "-",
            _input(scales.get(row["name"], {})),
            decibels(row["sqnr_db"]),
            row["reason"] or "",
        ]
        for row in layer_rows(gm, tower)
    ]
    screen.table(
        layers, (f"{tower} layer", "W bits", "A bits", "input scale, zero", "SQNR (dB)", "why not")
    )
    blocks = [
        [row["name"], _number(row["r2"]), _number(row["r2_held_out"]), row["parameters"]]
        for row in block_rows(gm, tower)
    ]
    screen.table(blocks, (f"\n{tower} block", "\nR2", "\nheld-out R2", "\nparameters"))
    skips = [[row["pass"], row["node"], row["reason"]] for row in skip_rows(gm)]
    if skips:
        screen.table(skips, ("\npass", f"\nskipped in the {tower} tower", "\nreason"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _input(entry: dict[str, Any]) -> str:
    if "input" not in entry:
        return "-"
    scale, zero_point = entry["input"]
    if scale.numel() > 1:
        return f"{scale.numel()} channels"
    return f"{float(scale):.4g}, {float(zero_point):g}"
