"""`quantize --resume` after a kill anywhere in calibration: the artifact of an uninterrupted run."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

KILLED = -signal.SIGKILL
BEST = ("--wq_params", "4", "--aq_params", "4")  # compensated, as every run of `words`
REPQ = ("--recipe", "repq-vit", "--wq_params", "6", "--aq_params", "6")
RECIPES = {"best": BEST, "repq-vit": REPQ}


def contents(folder: Path) -> dict[str, object]:
    """Every file, byte for byte; of the report, all that is no time and no memory."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    report = json.loads(found["report.json"])  # type: ignore[arg-type]
    for name in ("seconds", "peak_rss_bytes"):
        report.pop(name)
    found["report.json"] = report
    return found


@pytest.fixture(scope="module")
def whole(program, clip_files, tmp_path_factory) -> dict[str, dict[str, object]]:
    """The uninterrupted run of each recipe."""
    found = {}
    for name, extra in RECIPES.items():
        output = tmp_path_factory.mktemp("whole") / "out"
        assert program.run(clip_files.words(output, *extra)) == 0, program.said
        found[name] = contents(output)
    return found


def killed_and_resumed(
    program, clip_files, output: Path, recipe: str, moments: list[tuple[str, int]]
) -> dict[str, object]:
    """Runs killed at these moments, one resuming the other, and a last one that ends."""
    words = clip_files.words(output, *RECIPES[recipe])
    for phase, call in moments:
        assert program.run(words, at=[phase, call], signal=int(signal.SIGKILL)) == KILLED
        assert not output.exists()
        words = clip_files.words(output, *RECIPES[recipe], "--resume")
    assert program.run(words) == 0, program.said
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    return contents(output)


@pytest.mark.parametrize(
    ("recipe", "moments"),
    [("best", [("step", 17), ("checkpoint", 14)]), ("repq-vit", [("step", 3), ("finish", 0)])],
)
def test_some_kills(program, clip_files, whole, tmp_path: Path, recipe: str, moments: list) -> None:
    got = killed_and_resumed(program, clip_files, tmp_path / "out", recipe, moments)
    assert got == whole[recipe]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_steps(
    program, clip_files, whole, tmp_path: Path, recipe: str, seed: int
) -> None:
    choose = random.Random(f"{recipe} {seed}")
    # Steps of both towers, and of a run that goes on behind a finished tower.
    whole_run, second_run = {"best": (50, 20), "repq-vit": (6, 3)}[recipe]
    moments = [("step", choose.randrange(whole_run)), ("step", choose.randrange(second_run))]
    got = killed_and_resumed(program, clip_files, tmp_path / "out", recipe, moments)
    assert got == whole[recipe]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["finish", "forget", "save"])
@pytest.mark.parametrize("call", [0, 1])
def test_kills_between_the_towers(
    program, clip_files, whole, tmp_path: Path, phase: str, call: int
) -> None:
    got = killed_and_resumed(program, clip_files, tmp_path / "out", "best", [(phase, call)])
    assert got == whole["best"]


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(
    program, clip_files, whole, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = clip_files.words(output, *REPQ)
    assert program.run(words, at=["step", 2], signal=int(signal.SIGKILL)) == KILLED
    last = sorted((tmp_path / "out.partial" / "calibration" / "image").glob("0*"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert program.run([*words, "--resume"]) == 0, program.said
    assert "is damaged: going on from the one before" in program.said
    assert contents(output) == whole["repq-vit"]


def test_other_settings_or_data_are_refused(program, clip_files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = clip_files.words(output, *REPQ)
    assert program.run(words, at=["step", 3], signal=int(signal.SIGKILL)) == KILLED
    for change, said in (
        (("--aq_params", "5"), "a_bits is 5"),
        (("--calib-samples", "16"), "calib_samples is 16"),
    ):
        assert program.run([*words, *change, "--resume"]) == 2
        assert said in program.said
        assert "Traceback" not in program.said
    # The evaluation's record of the settings gone, the calibration's own still tells.
    evaluation = tmp_path / "out.partial" / "evaluation" / "run.json"
    evaluation.unlink()
    assert program.run([*words, "--seed", "2", "--resume"]) == 2
    assert "checkpoint of another calibration: calibration data is" in program.said
