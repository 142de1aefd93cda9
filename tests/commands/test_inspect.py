"""`qwt-fx inspect`: a layer that was spoilt comes first; the figures are what numpy counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_files import write_small_clip
from torch.fx import GraphModule
from toys import Tower, randomize

import qwt_fx
from qwt_fx import QuantConfig, api
from qwt_fx.cli import main
from qwt_fx.commands.reproduce import command_line
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import layer_name, weight_layers
from qwt_fx.graph.runner import run_all
from qwt_fx.inspect.inspection import inspect_rows, own_errors, scale_changes
from qwt_fx.measure.layer_statistics import contributions, layer_statistics, weight_histograms
from qwt_fx.measure.measure import block_sqnr, clipped_fraction, sqnr_db
from qwt_fx.quant.layer_groups import weight_quantizer
from qwt_fx.quant.quantizers import Quantizer, qparams, quantizer_at

X = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
BAD = "blocks.1.fc2"
CONFIG = QuantConfig(w_bits=6, a_bits=6, recipe="repq-vit")


@pytest.fixture(scope="module")
def calibrated() -> GraphModule:
    tower = randomize(Tower(2))
    return api.calibrate(api.prepare(qwt_fx.capture(tower, (X,)), CONFIG), [(X,)])


def _layer(gm: GraphModule, name: str):
    return next(n for n in weight_layers(gm) if layer_name(n) == name)


def _spoil_weight(calibrated: GraphModule) -> GraphModule:
    """The scale of one weight before conversion: its codes lose their resolution."""
    gm = copy.deepcopy(calibrated)
    module = weight_quantizer(gm, _layer(gm, BAD))
    module.set_qparams(module.scale * 50, module.zero_point)
    return api.convert(gm)


def _spoil_input(calibrated: GraphModule) -> GraphModule:
    """The scale of one input after conversion, in both operators."""
    gm = api.convert(calibrated)
    dequantize = _layer(gm, BAD).args[0]
    for node in (dequantize, dequantize.args[0]):
        node.update_arg(1, node.args[1] * 50)
    gm.recompile()
    return gm


def _first(shown: str) -> str:
    """The layer of the first row under the first table's line."""
    lines = shown.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    return lines[rule + 1].split()[0]


@pytest.mark.parametrize("spoil", [_spoil_weight, _spoil_input])
def test_a_layer_with_a_scale_50_times_too_large_is_the_first_row(
    spoil: Callable[[GraphModule], GraphModule],
    calibrated: GraphModule,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    qwt_fx.save(api.convert(calibrated), tmp_path / "good")
    assert main(["inspect", "--artifact", str(tmp_path / "good")]) == 0
    shown = capsys.readouterr().out
    assert _first(shown) != BAD
    assert "scale changed" not in shown
    qwt_fx.save(spoil(calibrated), tmp_path / "bad")
    assert main(["inspect", "--artifact", str(tmp_path / "bad")]) == 0
    shown = capsys.readouterr().out
    assert _first(shown) == BAD
    assert "scale changed x50 since calibration" in shown
    assert shown.count("scale changed") == 1


def test_data_show_a_spoilt_input_that_calibration_has_no_record_of(
    calibrated: GraphModule,
) -> None:
    gm = _spoil_input(calibrated)
    graph_info(gm).layers.clear()
    assert scale_changes(gm) == {}
    statistics = layer_statistics(gm, (X,))
    errors = own_errors(gm, statistics)
    rows = inspect_rows(
        gm, "model", statistics=statistics, contributed=contributions(gm, (X,), errors)
    )
    assert rows[0]["name"] == BAD
    assert rows[0]["contributed"] > 3 * rows[1]["contributed"]


def test_clipped_shares_are_what_numpy_counts(calibrated: GraphModule) -> None:
    gm = api.convert(calibrated)
    seen = layer_statistics(gm, (X,))
    recorded = graph_info(gm).layers
    for name, one in seen.items():
        # Calibration measured the same batch in the same graph.
        assert one.clipped == pytest.approx(recorded[name]["clipped"], abs=1e-3)
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    quantizer = Quantizer(4, torch.tensor(0.2), torch.tensor(5))
    codes = np.round(x.astype(np.float64) / 0.2) + 5
    wanted = float(((codes < 0) | (codes > 15)).mean())
    assert 0.01 < wanted < 0.5
    assert clipped_fraction(torch.tensor(x), quantizer) == pytest.approx(wanted)


def test_weights_are_counted_by_the_levels_they_use(calibrated: GraphModule) -> None:
    gm = api.convert(calibrated)
    one = weight_histograms(gm)[BAD]
    layer = _layer(gm, BAD)
    scale, zero = (v.numpy() for v in qparams(gm)[BAD]["weight"])
    codes = np.round(layer.args[1].target(
        *[getattr(gm, str(a.target)) if hasattr(a, "target") else a for a in layer.args[1].args]
    ).detach().numpy() / scale[:, None]).astype(int)  # fmt: skip
    values, counts = np.unique(codes, return_counts=True)
    found = dict(zip(range(round(one.first), round(one.last) + 1), one.counts, strict=True))
    assert {v: c for v, c in found.items() if c} == dict(zip(values, counts, strict=True))
    assert (one.first, one.last) == (-zero.max(), 63 - zero.min())
    assert one.levels == 64


def test_the_last_layers_contribution_is_its_share_of_the_output(calibrated: GraphModule) -> None:
    gm = api.convert(calibrated)
    found = contributions(gm, (X,), {BAD: 0.01, "blocks.0.q": 0.0})
    with torch.no_grad():
        output = gm(X)
    values = {}

    def visit(node, env) -> None:
        if _layer(gm, BAD) in env:
            values["y"] = env[_layer(gm, BAD)]

    run_all(gm, (X,), visit)
    # The layer adds to the output: what it loses, the output loses.
    wanted = 0.01 * float(values["y"].square().sum() / output.square().sum())
    assert found[BAD] == pytest.approx(wanted, rel=0.15)
    assert found["blocks.0.q"] == 0.0


def test_histograms_hold_every_value_and_the_quantizers_levels(calibrated: GraphModule) -> None:
    gm = api.convert(calibrated)
    one = layer_statistics(gm, (X,))[BAD]
    assert sum(one.values.counts) == 6 * 5 * 32
    assert len(one.channel_low) == 32
    quantizer = quantizer_at(gm, _layer(gm, BAD).args[0])
    assert one.values.step == pytest.approx(float(quantizer.scale))
    assert one.values.last - one.values.first == pytest.approx(63 * one.values.step)


def test_blocks_are_compared_with_the_floating_point_graph(calibrated: GraphModule) -> None:
    floating = qwt_fx.capture(randomize(Tower(2)), (X,))
    gm = api.convert(calibrated)
    found = block_sqnr(floating, gm, [(X[:3],), (X[3:],)])
    assert list(found) == ["blocks.0", "blocks.1"]
    with torch.no_grad():  # the last block's value is the output
        assert found["blocks.1"] == pytest.approx(sqnr_db(floating(X), gm(X)), abs=1e-3)
    assert set(block_sqnr(floating, floating, [(X,)]).values()) == {None}


def test_a_command_is_written_with_its_flags() -> None:
    settings = {
        "model": "a b.json", "qwerty": None, "allow_torchscript": True, "w_bits": 4,
        "override": [["*.c_proj", "w8a8"]], "remedy": [["refit", False]], "torch": "2", "data": {},
    }  # fmt: skip
    text = command_line(settings, "out")
    assert text.replace(" \\\n   ", "") == (
        "qwt-fx quantize --model 'a b.json' --allow-torchscript --w-bits 4 "
        "--override '*.c_proj=w8a8' --remedy refit=false --output out"
    )
    assert command_line(None) is None


def test_one_graph_takes_no_model_and_no_data(
    calibrated: GraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qwt_fx.save(api.convert(calibrated), tmp_path / "a")
    assert main(["inspect", "--artifact", str(tmp_path / "a"), "--train-data", "x.tar"]) == 2
    assert "one graph" in capsys.readouterr().err
    assert main(["inspect"]) == 2


@pytest.mark.slow
def test_the_page_of_an_artifact_with_data_has_every_chart(tmp_path: Path) -> None:
    words = write_small_clip(tmp_path / "clip")
    output = tmp_path / "art"
    quantize = ["quantize", *words, "--w-bits", "4", "--a-bits", "4", "--recipe", "repq-vit"]
    assert main([*quantize, "--qwt", "--output", str(output)]) == 0
    page = tmp_path / "page.html"
    assert main(["inspect", "--artifact", str(output), *words, "--html", str(page)]) == 0
    text = page.read_text()
    assert "Not measured" not in text
    assert "qwt-fx quantize" in text
    for stage in ("before reparameterization", "after RepQ", "after QwT"):
        assert stage in text
    assert main(["inspect", "--artifact", str(output), "--html", str(page)]) == 0
    assert "Not measured: give --model and --train-data" in page.read_text()
    model = ["inspect", *words, "--recipe", "repq-vit", "--no-stages", "--html", str(page)]
    assert main(model) == 0  # quantized here, by the same flags
    text = page.read_text()
    assert text.count("Not measured") == 2  # the stages of both towers
    assert "quantized" in text
