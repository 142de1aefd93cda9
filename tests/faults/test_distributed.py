"""Several processes do what one does, bit for bit; when one ends, all end and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import noise_image
from shard_files import write_tar

ALONE = ("seconds", "peak_rss_bytes", "processes", "run")


def stored(folder: Path) -> dict[str, bytes]:
    """What was computed: all files but the report, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


def figures(path: Path) -> dict[str, Any]:
    """A report without what it says of the run itself."""
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ALONE}


def assert_same(one: Path, other: Path) -> None:
    assert set(stored(one)) >= {"artifact.json", "image.safetensors", "text.safetensors"}
    assert stored(one) == stored(other)
    assert figures(one / "report.json") == figures(other / "report.json")


def test_two_processes_give_the_bits_of_one(
    program, clip_files, clip_artifact: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    assert program.run(clip_files.words(output), ranks=2) == 0, program.said
    assert_same(clip_artifact, output)
    found = json.loads((output / "report.json").read_text())["processes"]
    assert found["count"] == 2
    assert found["wire_bytes"] > 0
    assert program.said.count("class names are the names") == 1  # one process speaks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "repq-vit"),
        ("--recipe", "repq-vit", "--compat", "original"),
        ("--compensation", "affine", "--attention", "auto", "--a-bits", "4", "--w-bits", "4"),
        ("--exceptions", "0.2", "--towers", "image", "--w-bits", "4", "--remedy", "target=local"),
        ("--precision", "bf16", "--workers", "2"),
    ],
    ids=" ".join,
)
def test_every_option_gives_the_bits_of_one_process(
    program, clip_files, tmp_path: Path, options: tuple[str, ...], ranks: int
) -> None:
    for name, count in (("one", {}), ("many", {"ranks": ranks})):
        words = clip_files.words(tmp_path / name, *options)
        assert program.run(words, **count) == 0, program.said
    if "original" in options:  # which is not saved
        assert figures(tmp_path / "one/report.json") == figures(tmp_path / "many/report.json")
    else:
        assert_same(tmp_path / "one", tmp_path / "many")


def pairs(folder: Path) -> str:
    """Retrieval data with three bad images, which differ in which rank meets them."""
    members = []
    for n in range(40):
        image = b"no image" if n in (3, 4, 21) else noise_image(n)
        members += [(f"{n:03d}.png", image), (f"{n:03d}.txt", f"{n} a\n{n} b".encode())]
    return write_tar(folder / "pairs.tar", members)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_counts_are_those_of_one_process(
    program, clip_files, clip_artifact: Path, tmp_path: Path, ranks: int
) -> None:
    f = clip_files.folder
    words = [
        *("eval", "--quiet", "--artifact", str(clip_artifact), "--batch-size", "2"),
        *("--model", str(f / "model.json"), "--pretrained", str(f / "model.safetensors")),
        *("--imagenet-val", str(f / "val"), "--retrieval-data", pairs(tmp_path)),
    ]
    for name, count in (("one", {}), ("many", {"ranks": ranks})):
        report = str(tmp_path / f"{name}.json")
        assert program.run([*words, "--report", report], **count) == 0, program.said
        assert program.said.count("3 of 40 samples could not be decoded") == 1
    one = figures(tmp_path / "one.json")
    assert one == figures(tmp_path / "many.json")
    assert one["metrics"]["quantized"]["n"] == 6
    assert one["metrics"]["quantized"]["image_retrieval_recall@1"] > 0.0


# -- one of them ends ----------------------------------------------------------------------------


def assert_nothing_written(output: Path, before: dict[str, bytes], said: str) -> None:
    assert stored(output) == before
    assert said.count("qwt-fx: error:") == 1, said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["read", "capture", "calibrate", "compensate", "evaluate"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_process_ends_all(
    program, clip_files, clip_artifact: Path, tmp_path: Path, rank: int, phase: str
) -> None:
    if phase == "read" and rank:
        pytest.skip("the first process alone reads")
    output = Path(shutil.copytree(clip_artifact, tmp_path / "out"))
    before = stored(output)
    at = {"at": [phase, 0], "signal": int(signal.SIGKILL), "rank": rank}
    assert program.run(clip_files.words(output), ranks=3, **at) != 0
    codes = program.answer["codes"]
    assert codes[rank] == -signal.SIGKILL
    assert all(code == 2 for i, code in enumerate(codes) if i != rank), codes
    assert_nothing_written(output, before, program.said)
    assert f"lost rank {rank}" in program.said or "lost another rank" in program.said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(
    program, clip_files, clip_artifact: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = Path(shutil.copytree(clip_artifact, tmp_path / "out"))
    before = stored(output)
    at = {"at": ["calibrate", 0], "signal": int(number), "rank": 1}
    program.run(clip_files.words(output), ranks=2, **at)
    assert program.answer["codes"] == [2, 128 + number]
    assert_nothing_written(output, before, program.said)


def refused(program, words: list[str], wanted: str, ranks: int = 2) -> None:
    program.run(words, ranks=ranks)
    assert set(program.answer["codes"]) == {2}, program.said
    assert program.said.count("error:") == 1, program.said
    assert wanted in program.said
    assert "Traceback" not in program.said


@pytest.mark.slow
def test_what_cannot_be_is_refused_once(program, clip_files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    refused(program, clip_files.words(output, "--batch-size", "24"), "1 calibration batches for 2")
    refused(program, clip_files.words(output, "--resume"), "in one process only")
    refused(program, clip_files.words(output, "--w-bits", "9"), "wanted 2..8")
    refused(program, clip_files.words(output, "--train-data", "/no.tar"), "do not exist")
    refused(program, ["demo"], "demo runs in one process")
    assert not output.exists()


@pytest.mark.slow
def test_torchrun_starts_and_ends_it(
    clip_files, clip_artifact: Path, program, tmp_path: Path
) -> None:
    output = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*launch, "-m", "qwt_fx", *clip_files.words(output)]
    subprocess.run(words, check=True, capture_output=True, env=environment, timeout=600)
    assert_same(clip_artifact, output)
    hook = Path(__file__).with_name("killed_rank.py")
    words = [*launch, str(hook), *clip_files.words(output)]
    before = stored(output)
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
    assert ended.returncode != 0
    assert stored(output) == before
    assert ended.stderr.count("qwt-fx: error: rank") == 1  # the rest is torchrun's own
