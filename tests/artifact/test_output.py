from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwt_fx.artifact import output as output_module
from qwt_fx.artifact.output import OutputDirectory, write_text_atomic
from qwt_fx.errors import OutputError

INDEX = json.dumps({"qwt_fx_artifact": 1, "files": {"image.safetensors": {}}})
REPORT = json.dumps({"schema": 1, "qwt_fx": "0.1.0"})


def artifact(folder: Path, mark: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text(INDEX)
    (folder / "image.safetensors").write_text(mark)
    (folder / "report.json").write_text(REPORT)
    return folder


def write(target: Path, mark: str = "new", **options: Any) -> None:
    with OutputDirectory(target, **options) as output:
        assert output.path == target.with_name(target.name + ".partial")
        (output.path / "image.safetensors").write_text(mark)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# -- what may be replaced --------------------------------------------------------------------------


def test_an_absent_folder_appears_with_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == {"out"}
    assert names(tmp_path / "a" / "b" / "out") == {"image.safetensors"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_an_artifact_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write(artifact(tmp_path / "out"))
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"image.safetensors"}


def test_a_folder_with_only_a_report_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text(REPORT)
    write(tmp_path / "out")
    assert names(tmp_path / "out") == {"image.safetensors"}


def test_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    artifact(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with OutputDirectory(tmp_path / "out") as output:
        (output.path / "x").write_text("new")
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "real") == {"x"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"notes.txt": "mine"}, "is not a qwt-fx artifact"),
        ({"artifact.json": "{}"}, "is not a qwt-fx artifact"),
        ({"artifact.json": '{"qwt_fx_artifact": 1'}, "is not a qwt-fx artifact"),
        ({"report.json": '{"mine": 1}'}, "is not a qwt-fx artifact"),
        ({"report.json": REPORT, "notes.txt": "mine"}, "is not a qwt-fx artifact"),
        ({"artifact.json": INDEX, "notes.txt": "mine"}, r"also holds 'notes\.txt'"),
        ({".hidden": ""}, r"it holds '\.hidden'"),
    ],
)
def test_anything_else_needs_force(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name, text in files.items():
        (target / name).write_text(text)
    with pytest.raises(OutputError, match=f"{reason}.*--force"), OutputDirectory(target):
        pytest.fail("work began")
    assert names(target) == set(files) and names(tmp_path) == {"out"}
    write(target, force=True)
    assert names(target) == {"image.safetensors"} and names(tmp_path) == {"out"}


def test_a_link_in_an_artifact_is_not_ours(tmp_path: Path) -> None:
    target = artifact(tmp_path / "out")
    (target / "image.safetensors").unlink()
    (target / "image.safetensors").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="--force"):
        write(target)


@pytest.mark.parametrize("force", [False, True])
def test_some_folders_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    home, here = tmp_path / "homes" / "me", tmp_path / "work" / "deep"
    home.mkdir(parents=True)
    here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    mount = tmp_path / "mount"
    mount.mkdir()
    is_mount = Path.is_mount
    monkeypatch.setattr(Path, "is_mount", lambda p: p == mount.resolve() or is_mount(p))
    places = [Path("/"), home, home.parent, here, here.parent, tmp_path, mount, Path(".")]
    for place in [*places, Path(".."), Path("~"), Path("deep/..")]:
        with pytest.raises(OutputError, match="never replaced"):
            write(place, force=force)
    (here / "link").symlink_to(home)
    with pytest.raises(OutputError, match="never replaced"):
        write(here / "link", force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced_nor_entered(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="not a folder"):
        write(tmp_path / "file", force=force)
    with pytest.raises(OutputError, match="file is not a folder"):
        write(tmp_path / "file" / "out", force=force)
    assert (tmp_path / "file").read_text() == "mine"


# -- the working folder ----------------------------------------------------------------------------


def test_after_a_failure_the_old_one_stands_and_the_work_is_kept(tmp_path: Path) -> None:
    target = artifact(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), OutputDirectory(target) as output:
        (output.path / "half").write_text("1")
        raise KeyboardInterrupt
    assert (target / "image.safetensors").read_text() == "old"
    assert (tmp_path / "out.partial" / "half").is_file()
    with OutputDirectory(target, resume=True) as output:
        assert (output.path / "half").is_file()
    assert names(tmp_path / "out") == {"half"} and names(tmp_path) == {"out"}


def test_a_new_run_starts_from_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="x"), OutputDirectory(target) as output:
        (output.path / "folder").mkdir()
        (output.path / "folder" / "half").write_text("1")
        raise ValueError("x")
    write(target)
    assert names(target) == {"image.safetensors"}


def test_a_failure_without_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), OutputDirectory(tmp_path / "out"):
        raise ValueError("x")
    with (
        pytest.raises(ValueError, match="x"),
        OutputDirectory(tmp_path / "out", keep_partial=False) as output,
    ):
        (output.path / "half").write_text("1")
        raise ValueError("x")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("force", [False, True])
def test_a_partial_folder_of_someone_else_is_not_touched(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("1")
    with pytest.raises(OutputError, match=r"out\.partial is in the way and holds 'mine'"):
        write(tmp_path / "out", force=force)
    assert names(tmp_path) == {"out.partial"}


def test_a_partial_file_or_link_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is in the way"):
        write(tmp_path / "out")
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(OutputError, match="is in the way"):
        write(tmp_path / "out")


def test_two_runs_into_one_folder_are_told_apart(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out") as output:
        (output.path / "work").write_text("1")
        with pytest.raises(OutputError, match="another process writes it"):
            write(tmp_path / "out")
    assert names(tmp_path / "out") == {"work"}


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if ".partial" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    real = getattr(os, call)
    monkeypatch.setattr(os, call, refuse)
    with (
        pytest.raises(OutputError, match="out: Permission denied"),
        OutputDirectory(tmp_path / "out"),
    ):
        pytest.fail("work began")


def test_what_appeared_during_the_work_is_not_deleted(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=r"the result is in .*out\.partial"),
        OutputDirectory(target) as output,
    ):
        (output.path / "image.safetensors").write_text("new")
        target.mkdir()
        (target / "mine").write_text("1")
    assert names(target) == {"mine"} and (tmp_path / "out.partial" / "image.safetensors").is_file()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_rename_keeps_the_old_and_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target, real, calls = artifact(tmp_path / "out"), os.rename, []

    def rename(source: Any, goal: Any) -> None:
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError(5, "Input/output error")
        real(source, goal)

    monkeypatch.setattr(output_module.os, "rename", rename)
    with pytest.raises(OutputError, match="Input/output error; the result is in"):
        write(target)
    assert (target / "image.safetensors").read_text() == "old"
    assert (tmp_path / "out.partial" / "image.safetensors").read_text() == "new"


def _in_child(work: Callable[[], None]) -> int:
    """Run in a forked process that ends without clean-up; how it ended."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(process, 0)[1]


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_at_any_step_of_the_replacement_is_put_right(tmp_path: Path, moment: int) -> None:
    target = artifact(tmp_path / "out")
    steps = {"rename": os.rename, "rmtree": output_module.shutil.rmtree}
    taken: list[str] = []

    def step(name: str) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            if len(taken) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            taken.append(name)
            steps[name](*args, **options)

        return run

    def replace() -> None:
        output_module.os.rename = step("rename")
        output_module.shutil.rmtree = step("rmtree")
        write(target, "killed")

    assert os.WTERMSIG(_in_child(replace)) == signal.SIGKILL
    expected = "killed" if moment == 2 else "old"
    found = [target, *tmp_path.glob(".out.*")]  # between the renames the old one is aside
    assert expected in {(f / "image.safetensors").read_text() for f in found if f.exists()}
    with pytest.raises(ValueError, match="x"), OutputDirectory(target, force=True):
        assert (target / "image.safetensors").read_text() == expected
        raise ValueError("x")
    write(target, force=True)
    assert (target / "image.safetensors").read_text() == "new" and names(tmp_path) == {"out"}


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    _in_child(lambda: OutputDirectory(tmp_path / "out").__enter__() and None)
    assert names(tmp_path) == {"out.partial"}
    write(tmp_path / "out")
    assert names(tmp_path) == {"out"}


# -- text files ------------------------------------------------------------------------------------


def test_a_text_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "report.json"
    write_text_atomic(path, "old")
    write_text_atomic(path, "né\n")
    assert path.read_bytes() == "né\n".encode() and names(path.parent) == {"report.json"}


def test_a_text_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_text_atomic(path, "old")

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module.os, "replace", refuse)
    with pytest.raises(OutputError, match=r"report\.json: No space left"):
        write_text_atomic(path, "new")
    with pytest.raises(OutputError, match="cannot write"):
        write_text_atomic(path, "\ud800")
    assert path.read_text() == "old" and names(tmp_path) == {"report.json"}


def test_a_folder_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        write_text_atomic(tmp_path, "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        write_text_atomic(tmp_path / "file" / "report.json", "x")
