"""A run that is cut off at any moment loses nothing: the old artifact stands, or the new one does."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import PHASES

from qwt_fx.artifact.artifact import read_artifact

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
# (phase, which call of it)
BEGINNINGS = [
    (phase, 0)
    for phase in "load read capture calibrate compensate convert evaluate save index report".split()
]
# Each tower is saved, with an index, when it is finished, and again with the artifact.
LATER = [
    ("capture", 1), ("calibrate", 1), ("compensate", 3), ("save", 2), ("save", 3), ("index", 2),
    ("commit", 1),
]  # fmt: skip
MOMENTS = [
    (number, *moment)
    for number in SIGNALS
    for moment in (*BEGINNINGS, ("commit", 0), *(LATER if number == signal.SIGKILL else []))
]


@pytest.fixture
def output(clip_artifact: Path, tmp_path: Path) -> Path:
    """A folder that holds an artifact, to be replaced."""
    return Path(shutil.copytree(clip_artifact, tmp_path / "out"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_whole(output: Path, before: dict[str, bytes], new: bool = False) -> None:
    """The old artifact, byte for byte, or where the run was about to end a whole new one."""
    aside = output.parent / f".{output.name}.qwt-fx-replaced"
    if not output.exists():  # killed between the two renames; the next run puts it back
        assert files_of(aside) == before
        return
    now = files_of(output)
    if now != before:
        assert new, "replaced before the run was complete"
        read_artifact(output)
        assert set(before) <= set(now)


def cut_off(program, clip_files, output: Path, number: int, phase: str, call: int) -> None:
    before = files_of(output)
    code = program.run(clip_files.words(output), at=[phase, call], signal=int(number))
    assert code == SIGNALS[signal.Signals(number)], program.said
    assert "Traceback" not in program.said
    assert_whole(output, before, new=phase == "commit")


@pytest.mark.parametrize(
    ("number", "phase"),
    [(signal.SIGTERM, "capture"), (signal.SIGKILL, "save"), (signal.SIGINT, "calibrate")],
)
def test_some_moments(program, clip_files, output: Path, number: int, phase: str) -> None:
    cut_off(program, clip_files, output, number, phase, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "phase", "call"), MOMENTS)
def test_every_signal_at_every_phase(
    program, clip_files, output: Path, number: int, phase: str, call: int
) -> None:
    cut_off(program, clip_files, output, number, phase, call)
    if number == signal.SIGKILL and (phase, call) in (("commit", 1), ("save", 3)):
        assert program.run(clip_files.words(output)) == 0, program.said
        read_artifact(output)
        assert [p.name for p in output.parent.iterdir()] == [output.name]


@pytest.mark.slow
def test_kills_at_random_moments(program, clip_files, output: Path) -> None:
    before = files_of(output)
    choose = random.Random(0)
    for _ in range(12):
        number = choose.choice([signal.SIGKILL, signal.SIGTERM])
        after = choose.uniform(0.0, 6.0)
        code = program.run(clip_files.words(output), after=after, signal=int(number))
        assert code in (0, SIGNALS[number])
        assert_whole(output, before, new=code == 0 or number == signal.SIGKILL)
        before = files_of(output) if output.exists() else before


# -- the disk ----------------------------------------------------------------------------------


def disk_full(program, clip_files, output: Path, phase: str, size: int) -> None:
    before = files_of(output)
    code = program.run(clip_files.words(output), at=[phase, 0], file_bytes=size)
    assert code == 2, program.said
    if size > 0:  # otherwise the log, a file too, takes no message either
        message = program.said.strip().splitlines()[-1]
        assert message.startswith("qwt-fx: error: cannot write "), message
    assert "Traceback" not in program.said
    assert files_of(output) == before


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_old_artifact_stands(
    program, clip_files, output: Path
) -> None:
    disk_full(program, clip_files, output, "save", 100_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "size"),
    [("save", 0), ("save", 4096), ("save", 900_000), ("index", 0), ("index", 800), ("report", 800)],
)
def test_a_disk_full_at_every_file(
    program, clip_files, output: Path, phase: str, size: int
) -> None:
    disk_full(program, clip_files, output, phase, size)


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A folder that others may read and only its owner may write."""
    folder = Path(tempfile.mkdtemp(prefix="qwt-fx-readonly-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")
def test_an_output_that_becomes_read_only_is_one_error(
    program, clip_files, unwritable: Path
) -> None:
    output = unwritable / "out"
    # Not earlier: without rights the interpreter could not import what it has not yet.
    code = program.run(clip_files.words(output), at=["save", 0], lose_rights=True)
    assert code == 2, program.said
    assert "ermission denied" in program.said and "Traceback" not in program.said
    assert not output.exists()


def test_a_place_that_cannot_be_written_is_refused_before_any_work(program, clip_files) -> None:
    assert program.run(clip_files.words(Path("/proc/qwt-fx/out"))) == 2
    assert program.said.startswith("qwt-fx: error: cannot write --output /proc/qwt-fx/out")
    assert program.answer["seconds"] < 5.0


def test_the_limit_really_fills_the_disk(tmp_path: Path) -> None:
    """The trick of these tests: a file cannot grow beyond a limit, and writing says so."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        try:
            (tmp_path / "a").write_bytes(b"x" * 100)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_begins_with_a_function_that_exists(phase: str) -> None:
    """Moved functions are noticed at once, not by the slow tests alone."""
    owner, name = PHASES[phase]
    assert callable(getattr(owner, name))
