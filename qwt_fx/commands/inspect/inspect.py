"""`qwt-fx inspect`: every block, layer and skip of an artifact or a model, the worst layer first."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwt_fx.artifact.json_values import JsonObject
from qwt_fx.artifact.output import write_text_atomic
from qwt_fx.commands.arguments import (
    add_calibration,
    add_common,
    add_model,
    add_quant,
    add_sample_keys,
)
from qwt_fx.commands.inputs import check_flags
from qwt_fx.commands.inspect.inspect_data import Subject, gather, open_subject
from qwt_fx.commands.screen import Screen
from qwt_fx.errors import ConfigError
from qwt_fx.inspect.page.data import STAGES, Absent, PageData, TowerData
from qwt_fx.inspect.page.document import render
from qwt_fx.inspect.page.tables import LAYER_HEADERS, layer_cells

NAME, HELP = "inspect", "list blocks, layers and skips, the worst layer first"
EXAMPLE = """\
examples:
  qwt-fx inspect --artifact vit-b-32-w6a6
  qwt-fx inspect --artifact vit-b-32-w6a6 --model ViT-B-32 --pretrained openai \\
      --train-data 'cc3m-train-{0000..0575}.tar' --html vit-b-32-w6a6.html
"""
_WRAPPED = (
    "layer", "bits", "input\nscale, zero", "weight\nscale, zero", "clipped\n(%)", "SQNR\n(dB)",
    "contri-\nbuted (%)", "kernel", "note",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags to its parser."""
    parser.add_argument("--artifact", metavar="DIR", help="what quantize wrote")
    add_model(parser)
    add_calibration(parser)
    add_sample_keys(parser)
    add_quant(parser)
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page here")
    parser.add_argument(
        "--no-stages",
        action="store_true",
        help="leave out of the page what has to be quantized anew: blocks before reparameterization, "
        "after RepQ, after QwT",
    )
    parser.add_argument(
        "--graph-order", action="store_true", help="layers in the order they run, not by error"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.artifact is None and args.model is None:
        raise ConfigError("--artifact DIR or --model is needed")
    check_flags(args)
    if args.artifact is not None:
        _refuse_settings(args)
    if args.html is not None and Path(args.html).is_dir():
        raise ConfigError(f"--html {args.html}: it is a folder; name a file in it")
    screen = Screen(args.quiet)
    subject = open_subject(args, screen)
    page = gather(args, subject, screen)
    for tower in page.towers:
        _show(screen, tower, _rows(subject, tower, args.graph_order))
    if args.html is not None:
        write_text_atomic(Path(args.html), render(page))
        _tell(screen, args.html, page)


def _refuse_settings(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for settings of a quantization that was done when the artifact was made."""
    settings = argparse.ArgumentParser()
    add_quant(settings)
    for name, value in vars(settings.parse_args([])).items():
        if getattr(args, name) != value:
            raise ConfigError(
                f"--{name.replace('_', '-')} says how a --model is quantized; {args.artifact} is "
                "quantized already: leave it out"
            )


def _rows(subject: Subject, tower: TowerData, graph_order: bool) -> list[JsonObject]:
    if not graph_order:
        return tower.rows
    place = {name: i for i, name in enumerate(subject.order(tower.name))}
    return sorted(tower.rows, key=lambda row: place[row["name"]])


def _tell(screen: Screen, path: str, page: PageData) -> None:
    parts = [page.size, *(part for tower in page.towers for part in tower.absent)]
    flags = dict.fromkeys(f for part in parts if isinstance(part, Absent) for f in part.flags)
    lacking = f"; {' and '.join(sorted(flags))} would fill what it lacks" if flags else ""
    screen.note(f"wrote {path}{lacking}")


def _show(screen: Screen, tower: TowerData, rows: list[JsonObject]) -> None:
    headers = (f"{tower.name} {_WRAPPED[0]}", *_WRAPPED[1:])
    assert len(headers) == len(LAYER_HEADERS)  # one table, two places
    screen.table([layer_cells(row) for row in rows], headers)
    sqnr = {} if isinstance(tower.stages, Absent) else tower.stages
    stages = [stage for stage in STAGES if stage in sqnr]
    blocks = [
        [
            row["name"],
            *(_number(sqnr[stage].get(row["name"]), 1) for stage in stages),
            _number(row["r2"], 3),
            _number(row["r2_held_out"], 3),
            str(row["parameters"]),
        ]
        for row in tower.blocks
    ]
    titles = [f"\nSQNR (dB)\n{stage}" for stage in stages]
    screen.table(
        blocks, (f"\n{tower.name} block", *titles, "\nR2", "\nheld-out R2", "\nparameters")
    )
    if tower.skips:
        skips = [[row["pass"], row["node"], row["reason"]] for row in tower.skips]
        screen.table(skips, ("\npass", f"\nskipped in the {tower.name} tower", "\nreason"))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
