"""What a newcomer types, and the one line that comes back: the place, what was meant, the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_files import pairs, write_tar
from small_files import write_small_clip

from qwt_fx.cli import main

# {a}: an artifact's folder; {d}: a folder with one shard; {e}: an empty one; {m}: a model's words.
MISTAKES = {
    # The command's own usage, and how several values are written.
    "sensitivity --candidates 4 8":
        "sensitivity: error: unrecognized arguments: 8; several values are joined by ',': "
        "--candidates 4,8",
    "sensitivity --candidates 4;8": "got '4;8', wanted widths in 2..8 joined by commas such as 4,6,8",
    "bench --artifact x --batch-sizes 1 16":
        "bench: error: unrecognized arguments: 16; several values are joined by ',': --batch-sizes 1,16",
    "bench --artifact x --runtime x86 eager": "joined by ',': --runtime x86,eager",
    "bench --artifact x --batch-sizes a": "got 'a', wanted a whole number; sizes are joined by commas",
    "quantize --train-data a.tar b.tar c.tar": "joined by '::': --train-data a.tar::b.tar::c.tar",
    "quantize --image-key jpg png": "joined by ';': --image-key 'jpg;png'",
    "quantize --model my model": "--model takes one value, in quotes where it has spaces",
    "quantize --wbits 4":
        "quantize: error: unrecognized arguments: --wbits 4; did you mean --w-bits",
    "quantize --w-bits 4.5": "--w-bits: got '4.5', wanted a whole number",
    "quantize --max-drop x": "--max-drop: got 'x', wanted a number",
    "eval --batch-size many": "--batch-size: got 'many', wanted a whole number",
    # All that is missing, at once and before a model is loaded.
    "quantize":
        "--model NAME (of open_clip, or a config JSON), --train-data SPEC (calibration shards, a folder "
        "or a csv file) and --output DIR are needed",
    "quantize {m} --output x":
        "--train-data SPEC (calibration shards, a folder or a csv file) is needed",
    "sensitivity": "--model NAME (of open_clip, or a config JSON) and --train-data SPEC",
    "quantize --choice fp32_eval --imagenet-val x":
        "--model NAME (of open_clip, or a config JSON) is needed",
    "eval --artifact {a} --pretrained openai --imagenet-val x":
        "--pretrained is given, but --model is not",
    "eval --artifact {a} --image-mean 0 0 0 --imagenet-val x":
        "--image-mean is given, but --model is not",
    "quantize {m} --train-data {d}/s.tar --output x --templates t":
        "--templates is given, but --imagenet-val is not",
    "quantize {m} --train-data {d}/s.tar --output x --iter 3 --calib-samples 5": "give one of them",
    # What is there is not what the flag takes.
    "eval --model {a} --imagenet-val x":
        "an artifact, whose towers are quantized already: give it as --artifact",
    "quantize --model {a} --train-data {d}/s.tar --output x":
        "an artifact, whose towers are quantized already",
    "quantize {m} --output x --train-data {d}":
        "a folder, wanted the shards in it by their names, such as {d}/s.tar",
    "quantize {m} --output x --train-data {e}": "a folder without shards",
    "quantize {m} --output x --train-data p.csv": "--dataset-type csv",
    "inspect --artifact {a} --w-bits 4": "--w-bits says how a --model is quantized",
    "inspect --artifact {a} --choice image_only": "--choice says how a --model is quantized",
    "sensitivity {m} --train-data {d}/s.tar --candidates 8":
        "--candidates 8: one width leaves nothing to choose, wanted two or more such as 4,8",
    "sensitivity {m} --train-data {d}/s.tar --max-act-bits 3": "no candidate of 4,6,8 is that narrow",
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    for name in ("d", "e", "a"):
        (folder / name).mkdir()
    (folder / "a" / "artifact.json").write_text("{}")
    write_tar(folder / "d" / "s.tar", pairs([1]))
    model = " ".join(write_small_clip(folder / "clip", 1)[:4])
    return {"m": model} | {name: str(folder / name) for name in ("a", "d", "e")}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_in_one_line(
    line: str, places: dict[str, str], capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("filepath\ttitle\n")
    wanted = MISTAKES[line].format(**places)
    try:
        code = main(line.format(**places).split())
    except SystemExit as error:  # argparse's own way out
        code = int(str(error.code))
    assert code == 2
    said = capsys.readouterr().err.splitlines()
    assert wanted in said[-1]
    assert not (tmp_path / "x").exists()
    usage = [text for text in said if text.startswith("usage:")]
    assert all(text.startswith(f"usage: qwt-fx {line.split()[0]}") for text in usage)


def test_quantize_without_evaluation_says_what_is_known_and_which_flag_tells_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_small_clip(tmp_path / "clip", 4)
    artifact = tmp_path / "a"
    made = ["quantize", *words, "--recipe", "repq-vit", "--choice", "image_only"]
    assert main([*made, "--output", str(artifact)]) == 0
    shown = capsys.readouterr()
    rows = {line.split("  ")[0] for line in shown.out.splitlines()[2:]}
    assert rows == {"image embedding SQNR (dB)", "size (MB)", "seconds"}
    assert "accuracy was not measured: give --imagenet-val DIR" in shown.err
    (artifact / "report.json").unlink()
    folder = tmp_path / "val" / "cat"
    folder.mkdir(parents=True)
    (tmp_path / "clip" / "0.png").rename(folder / "0.png")
    assert main(["eval", "--artifact", str(artifact), "--imagenet-val", str(folder.parent)]) == 0
    (size,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("size"))
    bytes_of_file = (artifact / "image.safetensors").stat().st_size
    assert size.split() == ["size", "(MB)", "-", f"{bytes_of_file / 1e6:.2f}"]
    assert main(["eval", *words[:4], "--imagenet-val", str(folder.parent)]) == 0
    assert "accuracy was not measured" not in capsys.readouterr().err
