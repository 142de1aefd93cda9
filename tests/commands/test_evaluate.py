"""`eval` and `quantize` with retrieval data: reports, resuming, keeping, CLIP_benchmark's files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from shard_files import write_tar
from small_clip import small_model, write_config

import qwt_fx
from qwt_fx.checkpoint.feature_store import Series
from qwt_fx.cli import main
from qwt_fx.evaluate.retrieval import RECALLS
from qwt_fx.inspect.report import empty_report

CLASSES = ("cat", "dog", "owl")


def picture(seed: int) -> bytes:
    """A PNG of blocks, another one for each seed."""
    import io

    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((24, 16), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads changes last bits, and a killed child does not inherit ours."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP, calibration and retrieval shards, a validation folder; and an artifact."""
    folder = tmp_path_factory.mktemp("files")
    write_config(folder / "model.json")
    state = {name: value.contiguous() for name, value in small_model().state_dict().items()}
    save_file(state, folder / "model.safetensors")
    pairs = [
        (f"{i:03d}.{ext}", picture(i) if ext == "png" else f"a {i} of b\na c {i}".encode())
        for i in range(40)
        for ext in ("png", "txt")
    ]
    write_tar(folder / "pairs.tar", pairs)
    for k, name in enumerate(CLASSES):
        (folder / "val" / name).mkdir(parents=True)
        for i in range(4 + k):
            (folder / "val" / name / f"{i}.png").write_bytes(picture(100 * k + i))
    words = [*quantize(folder), "--output", str(folder / "artifact")]
    assert main([*words, *zero_shot(folder), *retrieval(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(files: Path) -> Path:
    """The report of an evaluation that was not interrupted."""
    target = files / "whole.json"
    assert main(evaluate(files, target)) == 0
    return target


def model(files: Path) -> list[str]:
    return ["--model", str(files / "model.json"), "--pretrained", str(files / "model.safetensors")]


def quantize(files: Path) -> list[str]:
    calibration = ["--train-data", str(files / "pairs.tar"), "--calib-samples", "16"]
    bits = ["--batch-size", "8", "--w-bits", "4", "--a-bits", "4", "--recipe", "repq-vit"]
    bits += ["--threads", "1"]
    return ["quantize", *model(files), *calibration, *bits]


def zero_shot(files: Path) -> list[str]:
    return ["--imagenet-val", str(files / "val")]


def retrieval(files: Path) -> list[str]:
    return ["--retrieval-data", str(files / "pairs.tar")]


def evaluate(files: Path, report: Path, *extra: str) -> list[str]:
    both = [
        "--artifact",
        str(files / "artifact"),
        *model(files),
        "--batch-size",
        "8",
        "--threads",
        "1",
    ]
    return ["eval", *both, *zero_shot(files), *retrieval(files), "--report", str(report), *extra]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def keys(value: Any) -> Any:
    """The names of a report, without the values."""
    return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None


def test_the_report_has_every_key_and_the_table_the_recalls(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "deep" / "r.json"
    assert main(evaluate(files, target)) == 0
    report, shown = read(target), capsys.readouterr().out
    made = read(files / "artifact" / "report.json")
    for metrics in (report["metrics"], made["metrics"]):
        assert keys(metrics) == keys(empty_report()["metrics"])
        assert all(
            v is not None for side in metrics["cross_precision"].values() for v in side.values()
        )
        assert metrics["retrieval"] == {
            "images": 40, "texts": 80, "skipped_samples": 0, "shared_captions": 0
        }  # fmt: skip
    for key in RECALLS:
        assert f"{key} (%)" in shown
        for side in ("fp32", "quantized"):
            assert report["metrics"][side][key] == made["metrics"][side][key]
    assert report["metrics"]["fp32"]["n"] == 15
    assert set(report["run"]) == {"digest", "settings"}
    assert list(target.parent.iterdir()) == [target]


def test_only_retrieval_leaves_the_accuracies_null(files: Path, tmp_path: Path) -> None:
    words = ["eval", *model(files), *retrieval(files), "--report", str(tmp_path / "r.json")]
    assert main(words) == 0
    metrics = read(tmp_path / "r.json")["metrics"]
    assert metrics["fp32"]["acc1"] is None
    assert metrics["fp32"]["text_retrieval_recall@1"] is not None
    assert keys(metrics) == keys(empty_report()["metrics"])
    assert set(metrics["cross_precision"]["fp32_queries"].values()) == {None}


def test_retrieval_equals_clip_benchmarks_own_loop(files: Path, tmp_path: Path) -> None:
    """The loaded (model, transform, tokenizer) in plain open_clip code gives the report's numbers."""
    import io
    import tarfile

    from PIL import Image

    target = tmp_path / "r.json"
    words = ["eval", "--artifact", str(files / "artifact"), *retrieval(files)]
    assert main([*words, "--report", str(target)]) == 0
    encoder, transform, tokenizer = qwt_fx.clip.load_clip_benchmark(str(files / "artifact"), "")
    with tarfile.open(files / "pairs.tar") as tar:
        read_member = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    names = sorted(name for name in read_member if name.endswith("png"))
    images = torch.stack([transform(Image.open(io.BytesIO(read_member[n]))) for n in names])
    texts = [read_member[n.replace("png", "txt")].decode().splitlines() for n in names]
    with torch.no_grad():
        x = encoder.encode_image(images, normalize=True).double()
        t = encoder.encode_text(tokenizer([c for some in texts for c in some]), normalize=True)
        scores = (t.double() @ x.T).numpy()
    owner = np.repeat(np.arange(len(images)), 2)
    metrics = read(target)["metrics"]["quantized"]
    for k in (1, 5, 10):
        best = np.argsort(-scores, axis=1)[:, :k]
        expected = np.mean([o in row for o, row in zip(owner, best, strict=True)])
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(expected)
        best = np.argsort(-scores.T, axis=1)[:, :k]
        expected = np.mean([i in owner[row] for i, row in enumerate(best)])
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(expected)


def test_the_loaded_model_is_called_like_open_clips(files: Path) -> None:
    encoder, _, tokenizer = qwt_fx.clip.load_clip_benchmark(
        str(files / "model.json"), str(files / "model.safetensors"), None, "cpu"
    )
    reference = small_model()
    images, texts = torch.randn(2, 3, 16, 24), tokenizer(["a cat", "an owl"])
    with torch.no_grad():
        for normalize in (False, True):
            torch.testing.assert_close(
                encoder.encode_image(images, normalize=normalize),
                reference.encode_image(images, normalize=normalize),
            )
            torch.testing.assert_close(
                encoder.encode_text(texts, normalize=normalize),
                reference.encode_text(texts, normalize=normalize),
            )
        for ours, theirs in zip(encoder(images, texts), reference(images, texts), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_clip_benchmark_files_have_its_fields(files: Path, tmp_path: Path) -> None:
    template = str(tmp_path / "{dataset}_{model}_{pretrained}_{task}.json")
    words = evaluate(files, tmp_path / "r.json", "--clip-benchmark-json", template)
    assert main([*words, "--dataset-name", "wds/mine"]) == 0
    found = [read(path) for path in sorted(tmp_path.glob("wds_mine_*.json"))]
    assert len(found) == 4
    report = read(tmp_path / "r.json")["metrics"]
    for document in found:
        assert list(document) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
        assert (document["dataset"], document["language"]) == ("wds/mine", "en")
        side = "quantized" if document["pretrained"].endswith("-qwt-fx-w4a4-repq-vit") else "fp32"
        assert {k: report[side][k] for k in document["metrics"]} == document["metrics"]
        # As its `build` command makes a row of it.
        assert all(type(document[key]) is str for key in ("model", "pretrained"))
    assert {d["task"] for d in found} == {"zeroshot_classification", "zeroshot_retrieval"}
    assert set(found[0]["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--clip-benchmark-json", "{x}.json"], "{x}.json"),
        (["--retrieval-data", "gone-{0..1}.tar"], "2 of 2 shards do not exist"),
        (["--class-map", "gone.txt"], "gone.txt"),
    ],
)
def test_bad_flags_are_one_clear_line(
    files: Path, tmp_path: Path, extra: list[str], expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(evaluate(files, tmp_path / "r.json", *extra)) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["eval", "--model", "m"], ["eval", "--model", "m", "--imagenet-val", "x", "--resume"]]
)
def test_what_is_missing_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "needed" in (message := capsys.readouterr().err) or "needs --report" in message


def test_skip_existing_keeps_a_report_of_the_same_settings_only(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "val"
    shutil.copytree(files / "val", data)
    target = tmp_path / "r.json"
    words = ["eval", *model(files), "--imagenet-val", str(data), "--report", str(target)]
    words.append("--skip-existing")
    assert main(words) == 0
    first, table = target.read_bytes(), capsys.readouterr().out
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "kept" in shown.err
    assert (target.read_bytes(), shown.out) == (first, table)
    assert main([*words, "--batch-size", "4"]) == 0  # another setting
    assert "anew" in capsys.readouterr().err
    (data / "cat" / "9.png").write_bytes(picture(9))  # other data
    assert main(words) == 0
    assert "anew" in capsys.readouterr().err
    assert read(target)["metrics"]["fp32"]["n"] == 16


def test_quantize_skips_a_whole_artifact_only(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "artifact"
    shutil.copytree(files / "artifact", output)
    words = [*quantize(files), *zero_shot(files), *retrieval(files), "--skip-existing"]
    begun = (output / "report.json").stat().st_mtime_ns
    assert main([*words, "--output", str(output)]) == 0
    assert "kept" in capsys.readouterr().err
    assert (output / "report.json").stat().st_mtime_ns == begun
    (output / "text.safetensors").unlink()
    assert main([*words, "--output", str(output)]) == 2
    assert "text.safetensors" in capsys.readouterr().err


KILLED = """
import os, sys
from qwt_fx.checkpoint.feature_store import Series
from qwt_fx.cli import main
append, count = Series.append, [0]
def counted(self, tensors):
    append(self, tensors)
    count[0] += self.kept
    if count[0] == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
Series.append = counted
main(sys.argv[2:])
"""


def kill_after(batches: int, words: list[str]) -> None:
    """Run the program and kill it (-9) after so many batches were embedded."""
    command = [sys.executable, "-c", KILLED, str(batches), *words]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9


def figures(path: Path) -> dict[str, Any]:
    report = read(path)
    return {key: report[key] for key in ("metrics", "layers", "blocks", "size", "calibration")}


class Stop(BaseException):
    """Ends the program between two batches."""


def watched(monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> list[int]:
    """Counts the batches that are written from now on; the one after `stop` ends the program."""
    made: list[int] = []
    append = Series.append

    def counted(self: Series, tensors: dict[str, torch.Tensor]) -> None:
        if self.kept:
            if len(made) == stop:
                raise Stop
            made.append(1)
        append(self, tensors)

    monkeypatch.setattr(Series, "append", counted)
    return made


# Two batches of images and one of prompts for each model, then five of pairs.
@pytest.mark.parametrize("batches", [1, 4, 8])
def test_an_interrupted_eval_goes_on_and_gives_the_same_report(
    files: Path, whole: Path, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "r.json"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        watched(patch, stop=batches)
        main(evaluate(files, target))
    assert not target.exists()
    assert len(list((tmp_path / "r.json.partial").glob("*.safetensors"))) == batches
    made = watched(monkeypatch)
    assert main(evaluate(files, target, "--resume")) == 0
    assert len(made) == 2 + 1 + 2 + 1 + 5 - batches
    assert figures(target) == figures(whole)
    assert not (tmp_path / "r.json.partial").exists()


def test_a_killed_eval_goes_on_and_gives_the_same_report(
    files: Path, whole: Path, tmp_path: Path
) -> None:
    target = tmp_path / "r.json"
    kill_after(3, evaluate(files, target))
    assert not target.exists()
    assert len(list((tmp_path / "r.json.partial").glob("*.safetensors"))) == 3
    assert main(evaluate(files, target, "--resume")) == 0
    assert figures(target) == figures(whole)


def test_resume_refuses_other_settings(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "r.json"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        watched(patch, stop=1)
        main(evaluate(files, target))
    assert main(evaluate(files, target, "--resume", "--batch-size", "5")) == 2
    message = capsys.readouterr().err
    assert "batch_size is 5" in message
    assert "there it was 8" in message
    assert main(evaluate(files, target)) == 0  # anew without --resume


def test_a_killed_quantize_goes_on_with_its_evaluation(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    words = [*quantize(files), *zero_shot(files), *retrieval(files), "--output", str(output)]
    kill_after(4, words)
    assert not output.exists()
    assert main([*words, "--resume"]) == 0
    assert figures(output / "report.json") == figures(files / "artifact" / "report.json")
    assert {p.name for p in output.iterdir()} == {p.name for p in (files / "artifact").iterdir()}
    for path in (files / "artifact").glob("*.safetensors"):
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_numbered_folders_count_as_the_classes_they_name(files: Path, tmp_path: Path) -> None:
    names = [f"thing {i}" for i in range(11)]
    for folder, number in (("cat", "2"), ("dog", "10")):
        shutil.copytree(files / "val" / folder, tmp_path / "numbered" / number)
        shutil.copytree(files / "val" / folder, tmp_path / "padded" / f"{int(number):02d}")
    (tmp_path / "all.txt").write_text("\n".join(names))
    (tmp_path / "two.txt").write_text(f"{names[2]}\n{names[10]}\n")
    found = []
    for data, extra in (
        ("numbered", ["--classnames", str(tmp_path / "all.txt"), "--class-map", "index"]),
        ("padded", ["--classnames", str(tmp_path / "two.txt")]),
    ):
        target = tmp_path / f"{data}.json"
        words = ["eval", *model(files), "--imagenet-val", str(tmp_path / data), *extra]
        assert main([*words, "--batch-size", "4", "--report", str(target)]) == 0
        found.append(read(target)["metrics"]["fp32"])
    # The images come in another order, which is no other result.
    assert found[0] == found[1]
    assert found[0]["n"] == 9
