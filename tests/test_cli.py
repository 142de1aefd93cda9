"""The program end to end on a part of the demo's files: results, exit codes, nothing lost."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shallow_demo import LAYERS, write_shallow_demo
from torch.fx import GraphModule
from torch.nn.functional import normalize

import qwt_fx
from qwt_fx import api
from qwt_fx.cli import main
from qwt_fx.demo.assets import write_files

CLASSES = 12
# What a report always has, null where it was not measured.
REPORT_KEYS = {
    "schema", "qwt_fx", "torch", "model", "pretrained", "recipe", "compat", "towers", "w_bits",
    "a_bits", "compensation", "attention", "seed", "calibration", "metrics", "size", "seconds",
    "peak_rss_bytes", "layers", "blocks", "skips",
}  # fmt: skip
QUANTIZED_KEYS = {"acc1", "acc1_ci", "acc5", "n", "agreement", "embedding_sqnr_db"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files, with the first blocks and the first classes only."""
    folder = tmp_path_factory.mktemp("demo")
    write_shallow_demo(folder)
    kept = sorted((folder / "val").iterdir())[:CLASSES]
    small = folder / "small"
    for path in kept:
        shutil.copytree(path, small / path.name)
    names = (folder / "classnames.txt").read_text().splitlines()[:CLASSES]
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    return folder


def _model(demo: Path) -> list[str]:
    return ["--model", str(demo / "model.json"), "--pretrained", str(demo / "model.safetensors")]


def _data(demo: Path) -> list[str]:
    spec = str(demo / "calib-{000..003}.tar")
    return ["--train-data", spec, "--calib-samples", "24", "--batch-size", "12"]


def _eval(demo: Path) -> list[str]:
    small, names = str(demo / "small"), str(demo / "names.txt")
    return [
        "--imagenet-val",
        small,
        "--classnames",
        names,
        "--templates",
        str(demo / "templates.txt"),
    ]


def _quantize(demo: Path, output: Path, *extra: str) -> list[str]:
    return ["quantize", *_model(demo), *_data(demo), *_eval(demo), "--output", str(output), *extra]


def _report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def artifact(demo: Path) -> Path:
    """A 6-bit artifact of both towers, made with the original's spellings."""
    output = demo / "artifact"
    words = ["--choice", "all_quant", "--wq_params", "6", "--aq_params", "6", "--qwerty"]
    iterations = ["--iter", "2"]
    assert main([*_quantize(demo, output, *words, *iterations)]) == 0
    return output


def test_quantize_writes_an_artifact_and_a_whole_report(artifact: Path) -> None:
    report = _report(artifact)
    assert set(report) >= REPORT_KEYS
    assert set(report["metrics"]["quantized"]) >= QUANTIZED_KEYS
    assert set(qwt_fx.report(qwt_fx.clip.load(artifact).image)) >= REPORT_KEYS
    assert report["w_bits"] == report["a_bits"] == 6
    assert report["compensation"] == "qwt"
    assert report["calibration"]["samples"] == 24
    assert report["calibration"]["shards"] == 4
    assert report["metrics"]["quantized"]["n"] == CLASSES
    assert all(v is not None for v in report["metrics"]["quantized"]["embedding_sqnr_db"].values())
    assert report["size"]["quantized_bytes"] == sum(
        (artifact / f"{tower}.safetensors").stat().st_size for tower in ("image", "text")
    )
    assert not list(artifact.parent.glob("*.partial"))
    quantized = [row for row in report["layers"] if row["w_bits"] is not None]
    assert len(quantized) == LAYERS * 4 + 1 + LAYERS * 4
    assert all(row["reason"] for row in report["layers"] if row["w_bits"] is None)
    assert len(report["blocks"]) == 2 * LAYERS


def test_metrics_are_those_of_a_zero_shot_classifier_written_out(
    artifact: Path, demo: Path
) -> None:
    metrics = _report(artifact)["metrics"]
    files = [(label, f) for label, d in enumerate(sorted((demo / "small").iterdir()))
             for f in sorted(d.iterdir())]  # fmt: skip
    labels = torch.tensor([label for label, _ in files])
    templates = (demo / "templates.txt").read_text().splitlines()
    names = (demo / "names.txt").read_text().splitlines()
    ranked, features = {}, {}
    for kind, model in (
        ("fp32", qwt_fx.clip.load(demo / "model.json", demo / "model.safetensors")),
        ("quantized", qwt_fx.clip.load(artifact)),
    ):
        prompts = [[t.replace("{}", n) for t in templates if t] for n in names]
        with torch.no_grad():
            texts = torch.stack([model.text(model.tokenizer(p)) for p in prompts])
            images = torch.stack([model.transform(Image.open(f).convert("RGB")) for _, f in files])
            features[kind] = {"image": model.image(images), "text": texts}
        classes = normalize(normalize(texts, dim=-1).mean(dim=1), dim=-1)
        ranked[kind] = (normalize(features[kind]["image"], dim=-1) @ classes.T).argsort(
            dim=1, descending=True
        )
        hits = ranked[kind] == labels[:, None]
        assert metrics[kind]["acc1"] == pytest.approx(float(hits[:, 0].double().mean()))
        assert metrics[kind]["acc5"] == pytest.approx(float(hits[:, :5].double().sum() / len(hits)))
    first = [ranked[kind][:, 0] for kind in ("fp32", "quantized")]
    found = metrics["quantized"]
    assert found["agreement"] == pytest.approx(float((first[0] == first[1]).double().mean()))
    for tower, value in found["embedding_sqnr_db"].items():
        exact, rounded = (features[kind][tower].double() for kind in ("fp32", "quantized"))
        decibels = 10 * math.log10(exact.square().sum() / (exact - rounded).square().sum())
        assert value == pytest.approx(decibels, abs=0.01)


def test_eval_in_a_new_process_gives_the_same_accuracy(artifact: Path, demo: Path) -> None:
    target = demo / "again.json"
    words = ["eval", "--artifact", str(artifact), *_eval(demo), "--report", str(target)]
    subprocess.run([sys.executable, "-m", "qwt_fx", *words], check=True, capture_output=True)
    first, again = _report(artifact), json.loads(target.read_text())
    for key in ("acc1", "acc5", "n", "acc1_ci"):
        assert again["metrics"]["quantized"][key] == first["metrics"]["quantized"][key]


def test_eval_of_both_adds_delta_and_agreement(
    artifact: Path, demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--artifact", str(artifact), *_model(demo), *_eval(demo)]) == 0
    shown = capsys.readouterr().out
    agreement = _report(artifact)["metrics"]["quantized"]["agreement"]
    assert f"{100 * agreement:.2f}" in shown
    assert "FP32" in shown


def test_image_only_saves_the_classifier_and_evaluates_alike(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "image"
    assert main(_quantize(demo, output, "--choice", "image_only", "--w-bits", "4")) == 0
    entry = json.loads((output / "artifact.json").read_text())["extra"]["classifier"]
    assert entry["weight_bits"] == 4
    assert 0 <= entry["input"]["zero_point"] <= 255
    target = tmp_path / "r.json"
    assert main(["eval", "--artifact", str(output), *_eval(demo), "--report", str(target)]) == 0
    again = json.loads(target.read_text())
    assert again["metrics"]["quantized"]["acc1"] == _report(output)["metrics"]["quantized"]["acc1"]
    assert again["towers"] == ["image"]


def test_fp32_eval_needs_no_calibration(demo: Path, tmp_path: Path) -> None:
    words = ["quantize", *_model(demo), *_eval(demo), "--choice", "fp32_eval"]
    assert main([*words, "--output", str(tmp_path / "fp32")]) == 0
    metrics = _report(tmp_path / "fp32")["metrics"]
    assert metrics["fp32"]["n"] == CLASSES
    assert metrics["quantized"]["acc1"] is None


def test_log2_attention_runs_through_every_command(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "log2"
    assert (
        main(_quantize(demo, output, "--attention", "log2", "--w-bits", "4", "--a-bits", "4")) == 0
    )
    model = qwt_fx.clip.load(output)
    for tower in (model.image, model.text):
        nodes = [n for n in tower.graph.nodes if "quantize_log_sqrt2" in str(n.target)]
        assert len(nodes) == 2 * LAYERS  # q and dq
    assert main(["inspect", "--artifact", str(output)]) == 0
    assert main(["eval", "--artifact", str(output), *_eval(demo)]) == 0


def test_compat_original_is_evaluated_and_not_saved(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "original"
    words = ["--recipe", "repq-vit", "--compat", "original", "--qwt"]
    assert main(_quantize(demo, output, *words)) == 0
    assert [p.name for p in output.iterdir()] == ["report.json"]
    assert "not saved" in capsys.readouterr().err
    # One batch more than asked for, as the original reads in this setting.
    assert _report(output)["calibration"]["samples"] == 36


def test_a_config_file_sets_flags_and_the_line_wins(demo: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('w_bits = 4\na-bits = 5\nqwt = true\n[override]\n"*.mlp.c_proj" = "w8a8"\n')
    output = tmp_path / "out"
    assert main(_quantize(demo, output, "--config", str(config), "--w-bits", "7")) == 0
    report = _report(output)
    bits = {row["name"]: (row["w_bits"], row["a_bits"]) for row in report["layers"]}
    assert bits["visual.transformer.resblocks.0.mlp.c_fc"] == (7, 5)
    assert bits["visual.transformer.resblocks.0.mlp.c_proj"] == (8, 8)


def test_inspect_lists_every_layer(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--artifact", str(artifact)]) == 0
    shown = capsys.readouterr().out
    for row in _report(artifact)["layers"]:
        assert row["name"] in shown


def _tar(path: Path, members: dict[str, bytes], cut: int | None = None) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(buffer.getvalue()[:cut])
    return path


def _bad_inputs(demo: Path, tmp: Path) -> dict[str, tuple[Sequence[str], str]]:
    """What is wrong -> (command line, words of the message)."""
    out = str(tmp / "out")
    other = dict(load_file(demo / "model.safetensors"))
    other["visual.conv1.weight"] = torch.zeros(64, 3, 8, 8)
    save_file(other, tmp / "other.safetensors")
    (tmp / "empty.tar").write_bytes(b"")
    _tar(tmp / "cut.tar", {"a.png": b"x" * 4000, "a.txt": b"hello"}, cut=2000)
    _tar(tmp / "silent.tar", {"a.png": b"x", "b.png": b"y"})
    (tmp / "classless").mkdir()
    (tmp / "two.txt").write_text("a\nb\n")
    (tmp / "mine").mkdir()
    (tmp / "mine" / "notes.txt").write_text("keep me")
    (tmp / "file").write_text("a file")
    run = _quantize(demo, Path(out))

    def swap(flag: str, value: str) -> list[str]:
        words = list(run)
        words[words.index(flag) + 1] = value
        return words

    return {
        "unknown model": (swap("--model", "ViT-B-33"), "ViT-B-33"),
        "missing checkpoint": (swap("--pretrained", "/nowhere.pt"), "/nowhere.pt"),
        "another architecture": (
            swap("--pretrained", str(tmp / "other.safetensors")),
            "visual.conv1.weight",
        ),
        "empty tar": (swap("--train-data", str(tmp / "empty.tar")), "empty.tar"),
        "truncated tar": (swap("--train-data", str(tmp / "cut.tar")), "cut.tar"),
        "no captions": (swap("--train-data", str(tmp / "silent.tar")), "silent.tar"),
        "missing shard": (swap("--train-data", str(tmp / "x-{0..3}.tar")), "x-0.tar"),
        "no classes": (swap("--imagenet-val", str(tmp / "classless")), "classless"),
        "class names": (swap("--classnames", str(tmp / "two.txt")), str(CLASSES)),
        "no glob match": ([*run, "--override", "nothing.*=w8a8"], "nothing.*"),
        "not an artifact": (swap("--output", str(tmp / "mine")), "--force"),
        "output is a file": (swap("--output", str(tmp / "file")), "not a folder"),
        "iter differs": ([*run, "--iter", "9"], "--calib-samples"),
        "original best": ([*run, "--compat", "original"], "repq-vit"),
        "config missing": ([*run, "--config", str(tmp / "no.toml")], "no.toml"),
        "drop without data": (
            ["quantize", *_model(demo), *_data(demo), "--output", out, "--max-drop", "1"],
            "--imagenet-val",
        ),
        "eval of nothing": (["eval", *_eval(demo)], "--artifact"),
        "no artifact there": (
            ["eval", "--artifact", str(tmp / "mine"), *_eval(demo)],
            "artifact.json",
        ),
        "unknown device": ([*run, "--device", "tpu"], "tpu"),
    }


def test_bad_input_is_one_clear_line_and_exit_code_2(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what, (words, expected) in _bad_inputs(demo, tmp_path).items():
        assert main(words) == 2, what
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("qwt-fx: error: "), what
        assert expected in message, f"{what}: {message}"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["1", "9", "seven"])
def test_bits_out_of_range_are_refused_by_the_parser(
    demo: Path, value: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(_quantize(demo, tmp_path / "o", "--w-bits", value))
    assert stopped.value.code == 2


def test_an_unwritable_output_is_found_before_any_work(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(_quantize(demo, tmp_path / "deep" / "out")) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_force_replaces_a_folder_of_another_kind(demo: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("old")
    assert main([*_quantize(demo, target), "--force", "--recipe", "repq-vit"]) == 0
    assert not (target / "notes.txt").exists()
    assert (target / "artifact.json").exists()


def test_max_drop_exits_with_3_and_keeps_the_artifact(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    write_files(tmp_path / "whole", "hard")  # the shallow model has no accuracy to lose
    words = ["--w-bits", "2", "--a-bits", "2", "--recipe", "repq-vit", "--max-drop", "0.5"]
    assert main(_quantize(demo, output, *_model(tmp_path / "whole"), *words)) == 3
    assert (output / "artifact.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_under_the_final_name(
    demo: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "o"
    words = [sys.executable, "-m", "qwt_fx", *_quantize(demo, output)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    partial = tmp_path / "o.partial"
    for _ in range(600):
        if partial.exists():
            break
        time.sleep(0.1)
    assert partial.exists()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in errors
    assert not output.exists()


def test_demo_files_only_writes_files(tmp_path: Path) -> None:
    assert main(["demo", "--files", str(tmp_path / "f"), "--variant", "plain"]) == 0
    assert {p.name for p in (tmp_path / "f").iterdir()} >= {
        "model.json", "model.safetensors", "val", "classnames.txt", "templates.txt",
        "calib-000.tar", "calib-003.tar",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["demo", "quantize", "eval", "bench", "inspect"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "example" in capsys.readouterr().out


def _small_device(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Calibration that fits `most` samples of a batch; returns the sizes that were tried."""
    calibrate, tried = api.calibrate, []

    def limited(prepared: GraphModule, batches: Any, **options: Any) -> GraphModule:
        tried.append(max(batches.sizes))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return calibrate(prepared, batches, **options)

    monkeypatch.setattr(api, "calibrate", limited)
    return tried


def test_a_device_out_of_memory_gets_smaller_batches_said_aloud(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = _small_device(monkeypatch, most=4)
    output = tmp_path / "out"
    words = ["--batch-size", "16", "--recipe", "repq-vit"]
    assert main(_quantize(demo, output, *words)) == 0
    assert (output / "report.json").exists()
    assert tried[:3] == [16, 8, 4]
    assert "begins anew with batches of 4" in caplog.text


def test_a_device_that_holds_no_sample_is_one_line(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _small_device(monkeypatch, most=0)
    assert main(_quantize(demo, tmp_path / "out")) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert "with a single sample" in error[0] and "--device cpu" in error[0]
    assert not (tmp_path / "out").exists()
