"""`qwt-fx bench` on a small artifact, and what it measures with."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from small_clip import small_model, write_config
from torch import nn
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx import QuantConfig
from qwt_fx.artifact.artifact import write_artifact
from qwt_fx.backends import runtimes
from qwt_fx.backends.runtimes import Prepared, Source
from qwt_fx.cli import main
from qwt_fx.clip import clip
from qwt_fx.errors import PreconditionError
from qwt_fx.graph.nodes import compute_nodes
from qwt_fx.inspect.report import build_report
from qwt_fx.measure.floating import floating_graph
from qwt_fx.measure.kernel_audit import LayerKernel, refuse_if_float
from qwt_fx.measure.machine import memory_of, processor, sums_byte_products_exactly
from qwt_fx.measure.measure import sqnr_db
from qwt_fx.measure.timing import Latency, interleaved


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP whose image tower is quantized, one layer excepted."""
    folder = tmp_path_factory.mktemp("bench")
    model = clip.load(write_config(folder / "small.json"), allow_random=True)
    config = QuantConfig(compensation="none", overrides={"*.0.mlp.c_fc": "skip"})
    batch = model.image_example(4)
    towers = {
        "image": qwt_fx.quantize(model.image, (batch,), [batch], config),
        "text": qwt_fx.capture(model.text, (model.text_example(2),)),
    }
    output = folder / "artifact"
    output.mkdir()
    write_artifact(output, towers, config=config.to_dict(), extra=clip.to_extra(model))
    return output


def bench(artifact: Path, *words: str) -> int:
    return main(["bench", "--artifact", str(artifact), "--rounds", "2", "--quiet", *words])


def check(report: dict, runtimes_run: set[str]) -> None:
    """What holds of every report."""
    assert report["threads"] == torch.get_num_threads() and report["rounds"] == 2
    assert report["processor"]["name"]
    assert {r["runtime"] for r in report["runs"]} == runtimes_run
    for row in report["runs"]:
        assert 0 < row["median_seconds"] <= row["p90_seconds"] < 60
        assert row["weight_bytes"] > 0
        assert row["floats"] == ("bfloat16" if row["runtime"] == "bf16-compile" else "float32")
    assert report["peak_rss_bytes"] > max(r["weight_bytes"] for r in report["runs"])


def test_bench_writes_figures_for_each_tower_batch_and_runtime(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    words = ["--runtime", "fp32-eager,eager", "--batch-sizes", "1,3", "--report", str(file)]
    assert bench(artifact, *words) == 0
    report = json.loads(file.read_text())
    check(report, {"fp32-eager", "eager"})
    keys = {(r["tower"], r["batch"], r["runtime"]) for r in report["runs"]}
    assert len(report["runs"]) == len(keys) == 8
    assert report["speedup_against"] is None and report["runs"][0]["speedup"] is None
    assert not any(layer["integer_kernel"] for layer in report["layers"])
    assert all(layer["reason"] for layer in report["layers"])
    shown = capsys.readouterr()
    assert "floats in" in shown.out and "float32" in shown.out
    assert "median ms" in shown.out and "interleaved" in shown.err


def test_figures_of_known_latencies(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten calls of 1 to 10 ms, and ten of 4 to 40 ms, in no order."""

    def measured(calls: Mapping[str, object], *args: object) -> dict[str, Latency]:
        assert list(calls) == ["fp32-compile", "eager"]
        order = (7, 2, 9, 4, 10, 1, 6, 3, 8, 5)
        unit = {"fp32-compile": 0.004, "eager": 0.001}
        return {name: Latency(tuple(unit[name] * n for n in order)) for name in calls}

    monkeypatch.setitem(runtimes.RUNTIMES, "fp32-compile", runtimes.RUNTIMES["fp32-eager"])
    monkeypatch.setattr("qwt_fx.commands.bench.interleaved", measured)
    file = tmp_path / "bench.json"
    words = ["--runtime", "fp32-compile,eager", "--tower", "text", "--batch-sizes", "11"]
    assert bench(artifact, *words, "--report", str(file)) == 0
    report = json.loads(file.read_text())
    assert report["speedup_against"] == "fp32-compile"
    figures = [
        [r[k] for k in ("median_seconds", "p90_seconds", "samples_per_second", "speedup")]
        for r in report["runs"]
    ]
    assert figures[0] == pytest.approx([0.022, 0.036, 500.0, 1.0])
    assert figures[1] == pytest.approx([0.0055, 0.009, 2000.0, 4.0])


@pytest.mark.slow
def test_bench_compares_integer_kernels_with_the_compiled_model(
    artifact: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    words = ["--runtime", "fp32-compile,x86", "--tower", "image", "--batch-sizes", "2"]
    assert bench(artifact, *words, "--report", str(file)) == 0
    report = json.loads(file.read_text())
    check(report, {"fp32-compile", "x86"})
    rows = {r["runtime"]: r for r in report["runs"]}
    assert rows["fp32-compile"]["speedup"] == 1.0
    assert 0.01 < rows["x86"]["speedup"] < 100.0
    layers = {la["name"]: la for la in report["layers"] if la["runtime"] == "x86"}
    assert layers["visual.transformer.resblocks.0.mlp.c_proj"]["integer_kernel"]
    skipped = layers["visual.transformer.resblocks.0.mlp.c_fc"]
    assert not skipped["integer_kernel"] and skipped["reason"] == "it is not quantized"


def test_nothing_in_integers_is_not_called_integer(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretender(source: Source) -> Prepared:
        return Prepared(source.floating, [LayerKernel("a", False, "gemm", "no int8 here")], 1)

    monkeypatch.setitem(runtimes.RUNTIMES, "onnxruntime", pretender)
    assert bench(artifact, "--runtime", "onnxruntime") == 2
    assert "no layer runs in an integer kernel (no int8 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runtime", "fp32-eager,tpu"], "runtime: got 'tpu', wanted one of fp32-eager"),
        (["--device", "cuda:7"], "--device: got 'cuda:7'"),
    ],
)
def test_bad_words_are_one_line(
    artifact: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(artifact, *words) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_gpu_that_is_not_there_is_one_line(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(artifact, "--runtime", "cuda") == 2
    assert "runtime cuda: this process sees no CUDA device" in capsys.readouterr().err


def test_rounds_are_interleaved_and_warm_up_does_not_count() -> None:
    called: list[str] = []
    found = interleaved(
        {n: lambda n=n: called.append(n) for n in "ab"}, rounds=3, warm_up=1, pause=0.0
    )
    assert "".join(called) == "bbaaaabbbbaaaabb"  # each turn is two calls
    assert all(len(latency.seconds) == 3 for latency in found.values())


def test_the_first_call_after_a_pause_does_not_count() -> None:
    calls = iter(range(4))

    def slow_after_a_pause() -> None:
        time.sleep(0.2 if next(calls) % 2 == 0 else 0.0)

    found = interleaved({"a": slow_after_a_pause}, rounds=2, warm_up=0, pause=0.0)
    assert max(found["a"].seconds) < 0.2


def test_median_and_p90() -> None:
    latency = Latency(tuple(float(s) for s in range(10, 0, -1)))
    assert (latency.median, latency.p90) == (5.5, 9.0)
    assert Latency((2.0,)).p90 == 2.0


def test_memory_of_a_call_sees_what_it_held() -> None:
    held = memory_of(lambda: torch.ones(20_000_000))
    if held is None:
        pytest.skip("this system keeps no peak that can be reset")
    assert 60e6 < held < 200e6
    assert processor()["name"]


@pytest.mark.parametrize(
    ("system", "flags", "exact"),
    [
        ("x86_64", ["avx2"], False),
        ("AMD64", ["avx2", "avx512bw"], False),
        ("x86_64", ["avx2", "avx512_vnni"], True),
        ("x86_64", ["avx_vnni"], True),
        ("x86_64", ["amx_int8"], True),
        ("x86_64", [], False),
        ("aarch64", [], True),
    ],
)
def test_where_byte_products_add_up_in_32_bits(
    monkeypatch: pytest.MonkeyPatch, system: str, flags: list[str], exact: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: system)
    monkeypatch.setattr(
        "qwt_fx.measure.machine.processor", lambda: {"name": "some", "flags": flags}
    )
    assert sums_byte_products_exactly() is exact


def test_the_floating_yardstick_has_the_products_and_no_quantizer() -> None:
    x = tokens(4)
    model = randomize(Tower(2))
    q = qwt_fx.quantize(model, (x,), [x], QuantConfig(attention="uniform", compensation="none"))
    floating = floating_graph(q)
    assert "quantized_decomposed" not in floating.code
    assert len(list(compute_nodes(floating))) == len(list(compute_nodes(q)))
    with torch.no_grad():
        assert sqnr_db(model(x), floating(x)) > sqnr_db(model(x), q(x))


def test_the_report_tells_what_runs_in_integers() -> None:
    x = tokens(4)
    config = QuantConfig(compensation="none", overrides={"blocks.0.fc1": "skip"})
    q = qwt_fx.quantize(randomize(Tower(1)), (x,), [x], config)
    audit = qwt_fx.kernel_audit(qwt_fx.lower(q, "x86"))
    rows = {r["name"]: r for r in build_report({"m": q}, config, {"m": audit})["layers"]}
    assert rows["blocks.0.fc2"]["integer_kernel"] is True and rows["blocks.0.fc2"]["reason"] is None
    assert rows["blocks.0.fc1"]["integer_kernel"] is False and rows["blocks.0.fc1"]["reason"]
    eager = build_report({"m": q}, config, {"m": qwt_fx.kernel_audit(qwt_fx.lower(q))})
    row = next(r for r in eager["layers"] if r["name"] == "blocks.0.fc2")
    assert row["integer_kernel"] is False and "dequantized" in row["reason"]
    assert all(r["integer_kernel"] is None for r in build_report({"m": q}, config)["layers"])


def test_eager_and_fp32_runtimes_return_the_towers_outputs() -> None:
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    visual: nn.Module = small_model().visual
    q = qwt_fx.quantize(visual, (x,), [x], QuantConfig(compensation="none"))
    source = Source("image", q, visual)
    with torch.no_grad():
        assert torch.equal(runtimes.RUNTIMES["fp32-eager"](source).run(x), visual(x))
        assert torch.equal(runtimes.RUNTIMES["eager"](source).run(x), q(x))


def test_onnx_runtime_is_a_runtime_whose_layers_are_integers() -> None:
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    visual: nn.Module = small_model().visual
    q = qwt_fx.quantize(visual, (x,), [x], QuantConfig(recipe="repq-vit", compensation="none"))
    prepared = runtimes.RUNTIMES["onnxruntime"](Source("image", q, visual, x))
    refuse_if_float(prepared.kernels, "onnxruntime")
    with torch.no_grad():
        torch.testing.assert_close(prepared.run(x), q(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(PreconditionError, match="example"):
        runtimes.RUNTIMES["onnxruntime"](Source("image", q, visual))
